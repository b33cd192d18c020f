"""Are the samples those of the dense posterior, their predictions those of the linearised model, and do they say so?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("laplace")

import solvers
from curvature import ggn
from curvature.laplace import LinearizedLaplace, PosteriorSampler, PosteriorSamples, Predictive, optimize_evidence
from solvers import CG, Diagonal, NotConvergedError, NotConvergedWarning, Nystrom
from tests.curvature import dense_reference as dense
from tests.curvature.laplace.problems import likelihood, loader_of, toy
from tests.curvature.laplace.test_evidence import Dense, close, expanded, known, posterior_of, priors
from tests.curvature.problems import F64, PROBLEMS, Problem, normal

NAMES = [
    "mlp_ce_all_options",
    "mlp_ce_probabilities",
    "mlp_mse",
    "mlp_bce",
    "linear_on_sequences",
    "frozen_parts",
    "module_used_twice",
    "cnn",
    "encoder_pre_norm",
    "language_model",
    "mapping_inputs",
]
EXACT = CG(rtol=1e-12, on_failure="raise")


def dense_jacobian(model: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """Output and Jacobian ``(*output, P)``, one backward pass per output."""
    z = dense.run(model, x)
    J = dense.jacobian(z.reshape(1, -1), list(dense.trainable(model).values()))
    return z.detach(), J.reshape(*z.shape, -1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse", "mlp_bce", "linear_on_sequences", "language_model", "cnn"])
def test_the_noise_is_the_root_of_the_output_hessian_pulled_back(name: str) -> None:
    """``J^T S xi`` with S written down for each loss, and xi from the same generator."""
    problem = PROBLEMS[name]()
    found = posterior_of(problem).draw(3, seeded(5))
    generator, expected = seeded(5), torch.zeros_like(found)
    for x, y in problem.data:
        z, J = dense_jacobian(problem.model, x)
        axis = z.dim() - 1
        n, c = z.shape[0], z.shape[axis]
        xi = torch.randn(3, n, z.numel() // (n * c), c, generator=generator, dtype=F64).reshape(3, *z.shape)
        if likelihood(problem) == "regression":
            v = xi
        elif isinstance(problem.loss_fn, nn.BCEWithLogitsLoss):
            p = z.sigmoid()
            weight = y * problem.loss_fn.pos_weight + 1 - y
            v = (weight * p * (1 - p)).sqrt() * xi
        else:
            p = z.softmax(-1)
            v = p.sqrt() * xi - p * (p.sqrt() * xi).sum(-1, keepdim=True)
            v = v * (y != problem.loss_fn.ignore_index).unsqueeze(-1)
        expected += v.reshape(3, -1) @ J.reshape(z.numel(), -1)
    close(found, expected, 1e-11)


@pytest.mark.parametrize("kind", ["scalar", "layers", "diagonal"])
@pytest.mark.parametrize("name", NAMES)
def test_with_the_noise_fixed_samples_are_the_dense_solution(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    reference, prior = Dense(problem), priors(problem.model, kind)
    numbers = {"temperature": 1.4} | ({"sigma_noise": 0.6} if reference.regression else {})
    posterior = posterior_of(problem, prior_precision=prior, **numbers)
    sampler = PosteriorSampler(posterior, 4, solver=EXACT)
    found = sampler()
    P = expanded(problem.model, prior)
    scale = 1 / (1.4 * numbers.get("sigma_noise", 1.0) ** 2)
    eta = sampler.prior_noise()
    right = scale**0.5 * sampler.curvature_noise + P.sqrt() * eta
    expected = torch.linalg.solve(scale * reference.H + P.diag(), right.T).T
    close(found.deviations, expected, 1e-8)
    close(found.values, reference.theta + expected, 1e-8)
    apart = (eta - P.sqrt() * expected).square()
    close(found.effective_dimension(total=True).value, apart.sum(1).mean(), 1e-7)
    close(found.effective_dimension().value, posterior.prior.sums(apart).mean(0), 1e-7)


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_samples_have_the_covariance_of_the_posterior(task: str) -> None:
    model, x, y = toy(task)
    problem = Problem(model, nn.MSELoss() if task == "regression" else nn.CrossEntropyLoss(), [(x, y)])
    reference, prior = Dense(problem), priors(model, "layers")
    draws = 20_000
    found = PosteriorSampler(known(posterior_of(problem, prior_precision=prior)), draws, solver=CG(rtol=1e-6))()
    covariance = torch.linalg.inv(reference.H + expanded(model, prior).diag())
    # The error of an entry of the covariance of normal numbers, and 946 entries: the largest is near 3.5 of them.
    error = ((covariance.diagonal().outer(covariance.diagonal()) + covariance.square()) / draws).sqrt()
    sample = found.deviations.T @ found.deviations / draws
    assert ((sample - covariance).abs() <= 5 * error).all()
    assert (found.deviations.mean(0).abs() <= 5 * (covariance.diagonal() / draws).sqrt()).all()
    gamma = found.effective_dimension()
    exact = found_sums(reference.effective_dimension(prior, 1.0), model)
    assert ((gamma.value - exact).abs() <= 4 * gamma.stderr).all()
    assert (gamma.stderr < 0.02 * exact + 0.01).all()


def found_sums(x: Tensor, model: nn.Module) -> Tensor:
    return torch.stack([part.sum() for part in x.split([p.numel() for p in dense.trainable(model).values()])])


def test_error_bars_of_effective_dimensions() -> None:
    problem = PROBLEMS["mlp_mse"]()
    reference, prior = Dense(problem), priors(problem.model, "layers")
    posterior = known(posterior_of(problem, prior_precision=prior))
    each = found_sums(reference.effective_dimension(prior, 1.0), problem.model)
    hits, runs = torch.zeros(5), 200
    for seed in range(runs):
        found = PosteriorSampler(posterior, 20, generator=seeded(seed), preconditioner=None)()
        value, total = found.effective_dimension(), found.effective_dimension(total=True)
        hits[:4] += ((value.value - each).abs() <= 2 * value.stderr).float()
        hits[4] += float((total.value - each.sum()).abs() <= 2 * total.stderr)
    # Sums of squares are skewed; those of a single parameter most.
    assert (hits / runs >= 0.85).all() and hits[4] / runs >= 0.9, hits / runs


@pytest.mark.parametrize("kind", ["scalar", "layers"])
def test_preconditioners_change_the_steps_and_not_the_samples(kind: str) -> None:
    problem = PROBLEMS["cnn"]()
    prior = 1e-3 * priors(problem.model, kind)
    posterior = known(posterior_of(problem, prior_precision=prior))
    summed = dense.summed(problem.loss_fn)

    def near(structure: Any) -> Any:
        return ggn(problem.model, summed, problem.data, structure=structure)

    plain = PosteriorSampler(posterior, 4, solver=EXACT, preconditioner=None)()
    steps = {}
    for name, preconditioner in {
        "diagonal": Diagonal(near("diagonal").diagonal()),
        "kfac": near("kfac"),
        "nystrom": Nystrom(40),
        "low_rank": near("low_rank"),
    }.items():
        sampler = PosteriorSampler(posterior, 4, solver=EXACT, preconditioner=preconditioner)
        found = sampler()
        close(found.deviations, plain.deviations, 1e-6)
        steps[name] = found.products
    # The root of five examples with three outputs is the whole curvature.
    assert steps["low_rank"] <= 4 * 6 and steps["nystrom"] <= 4 * 6 < plain.products
    with pytest.raises(TypeError, match="is diagonal, low-rank or block-diagonal, not Function"):
        size = posterior.curvature.in_shape
        PosteriorSampler(posterior, 2, preconditioner=solvers.Function(lambda x: x, size, symmetric=True))()
    with pytest.raises(ValueError, match=r"the preconditioner acts on \(3,\), the curvature on"):
        PosteriorSampler(posterior, 2, preconditioner=Diagonal(torch.ones(3, dtype=F64)))()


def test_other_hyperparameters_take_the_same_noise_and_start_from_the_solution_before() -> None:
    model, x, y = toy("regression")
    sampler = PosteriorSampler(LinearizedLaplace(model, "regression", (x, y)), 5, solver=CG(rtol=1e-10))
    first = sampler(0.5, 0.8)
    again = sampler(0.5, 0.8)
    assert again.products <= 2 * 5 < first.products
    close(again.deviations, first.deviations)
    moved = sampler(2.0)
    close(sampler(0.5, 0.8).deviations, first.deviations)
    fresh = PosteriorSampler(LinearizedLaplace(model, "regression", (x, y), prior_precision=2.0), 5, solver=EXACT)()
    close(moved.deviations, fresh.deviations, 1e-7)
    other = PosteriorSampler(sampler.posterior, 5, generator=seeded(1))(0.5, 0.8)
    assert (other.deviations - first.deviations).abs().max() > 0.1


def test_any_batches_give_the_same_posterior() -> None:
    model, x, y = toy()
    whole = LinearizedLaplace(model, "classification", (x, y))
    split = LinearizedLaplace(model, "classification", loader_of(x, y, 5))
    close(split.precision.to_dense(), whole.precision.to_dense())
    close(split.log_likelihood, whole.log_likelihood)


def test_a_solve_that_has_not_converged_says_so() -> None:
    model, x, y = toy("regression")
    posterior = LinearizedLaplace(model, "regression", (x, y), prior_precision=1e-6)
    hard = {"preconditioner": None, "solver": CG(rtol=1e-10, max_steps=3, on_failure="raise")}
    with pytest.raises(NotConvergedError, match=r"sampling from LinearizedLaplace.* has not converged for 4 of 4"):
        PosteriorSampler(posterior, 4, **hard)()
    with pytest.warns(NotConvergedWarning, match="has not converged for 4 of 4"):
        found = PosteriorSampler(posterior, 4, **hard | {"solver": CG(rtol=1e-10, max_steps=3)})()
    sampler = PosteriorSampler(posterior, 4)
    exact = PosteriorSampler(posterior, 4, solver=EXACT)().deviations
    for samples in (found, sampler()):
        # What is reported bounds the distance to the solution, in standard deviations of the prior.
        distance = (1e-6**0.5 * (samples.deviations - exact)).norm(dim=1)
        assert (distance <= samples.residual * (1 + 1e-6)).all()
    with pytest.raises(ValueError, match="samples is at least 1, not 0"):
        PosteriorSampler(posterior, 0)


@pytest.mark.parametrize("name", ["mlp_mse", "cnn", "encoder_pre_norm", "language_model", "linear_on_sequences"])
def test_predictions_are_those_of_the_linearised_model(name: str) -> None:
    problem = PROBLEMS[name]()
    samples = PosteriorSampler(posterior_of(problem), 5)()
    for x, _ in problem.data:
        z, J = dense_jacobian(problem.model, x)
        predictive = samples.predict(x)
        close(predictive.mean, z, 1e-12)
        moved = torch.einsum("...p,sp->s...", J, samples.deviations)
        close(predictive.deviations, moved, 1e-10)
        close(predictive.values, z + moved, 1e-10)
        close(predictive.variance().value, moved.square().mean(0), 1e-10)
        if name == "mlp_mse":
            with pytest.raises(ValueError, match=r"observation that is normal has no class probabilities"):
                predictive.probabilities()
        else:
            both = ((z + moved).softmax(-1) + (z - moved).softmax(-1)) / 2
            close(predictive.probabilities().value, both.mean(0), 1e-10)
            close(predictive.probabilities().value.sum(-1), torch.ones(z.shape[:-1]), 1e-10)
        close(predictive.average(torch.tanh).value, (((z + moved).tanh() + (z - moved).tanh()) / 2).mean(0), 1e-10)


def test_predictions_have_the_variance_and_the_probabilities_of_the_posterior() -> None:
    """Within their standard errors, which mean what they say."""
    model, x, y = toy()
    posterior = known(LinearizedLaplace(model, "classification", (x, y), prior_precision=2.0))
    covariance = torch.linalg.inv(posterior.precision.to_dense())
    z, J = dense_jacobian(model, x)
    variance = torch.einsum("ncp,pq,ncq->nc", J, covariance, J)
    root = torch.linalg.cholesky(J[0] @ covariance @ J[0].T)
    draws = torch.randn(400_000, 3, generator=seeded(), dtype=F64) @ root.T
    probabilities = (z[0] + draws).softmax(-1).mean(0)  # right to about 3e-4
    found = PosteriorSampler(posterior, 4000, solver=CG(rtol=1e-6))()
    predictive = found.predict(x)
    estimate = predictive.variance()
    assert ((estimate.value - variance).abs() <= 5 * estimate.stderr).all()
    estimate = predictive.probabilities()
    assert ((estimate.value[0] - probabilities).abs() <= 4 * estimate.stderr[0] + 1e-3).all()
    hits, runs = torch.zeros(3), 100
    for part in predictive.deviations.split(40):
        few = Predictive(predictive.mean, part).probabilities()
        hits += ((few.value[0] - probabilities).abs() <= 2 * few.stderr[0]).float()
    assert (hits / runs >= 0.9).all(), hits / runs


def test_predictions_form_no_jacobian() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 30)).double()
    x, y = normal(20, 4), torch.zeros(20, dtype=torch.long)
    samples = PosteriorSampler(LinearizedLaplace(model, "classification", (x, y)), 3)()
    with Largest() as largest:
        samples.predict(x)
    assert largest.numbers <= 3 * 20 * 30  # the samples of the outputs; a Jacobian has 20 * 30 * 310


def test_saved_samples_come_back(tmp_path: Any) -> None:
    problem = PROBLEMS["frozen_parts"]()
    samples = PosteriorSampler(posterior_of(problem), 3)()
    torch.save(samples.state_dict(), tmp_path / "samples.pt")
    model = PROBLEMS["frozen_parts"]().model
    back = PosteriorSamples.from_state_dict(model, torch.load(tmp_path / "samples.pt", weights_only=True))
    x = problem.data[0][0]
    assert torch.equal(back.predict(x).values, samples.predict(x).values)
    assert torch.equal(back.effective_dimension().stderr, samples.effective_dimension().stderr)
    assert back.names == samples.names and back.products == samples.products
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    with pytest.raises(RuntimeError, match="the model's parameters are not those that the posterior was made at"):
        back.predict(x)


def test_some_of_the_parameters() -> None:
    model, x, y = toy("regression")
    posterior = LinearizedLaplace(model, "regression", (x, y), params="2.*")
    samples = PosteriorSampler(posterior, 4, solver=EXACT)()
    assert samples.deviations.shape == (4, 18)
    J = dense_jacobian(model, x)[1][..., 25:]
    close(samples.predict(x).deviations, torch.einsum("ncp,sp->snc", J, samples.deviations), 1e-10)


def test_draws_that_are_normal_along_every_direction() -> None:
    """Label noise would have the covariance as well; these are normal."""
    model, x, y = toy()
    posterior = LinearizedLaplace(model, "classification", (x[:1], y[:1]))
    draws = posterior.draw(20_000, seeded())
    along = draws @ normal(43)
    kurtosis = along.pow(4).mean() / along.square().mean().square()
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / 20_000)


def test_tuning_uses_the_samples_options() -> None:
    model, x, y = toy("regression")
    start = LinearizedLaplace(model, "regression", (x, y), prior_precision=torch.ones(4))
    with pytest.raises(NotConvergedError, match="has not converged"):
        optimize_evidence(start, solver=CG(rtol=1e-12, max_steps=2, on_failure="raise"), preconditioner=None)
