"""Is the stochastic evidence that of the dense posterior, are its gradients, and does its error mean what it says?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace import Laplace

import solvers
from curvature.laplace import GGNBackend, LinearizedLaplace, PosteriorSampler, StochasticEvidence, optimize_evidence
from curvature.laplace.matrix_free.evidence import evidence
from curvature.losses import AutogradLoss, SumOfLosses
from solvers import Estimate, NotConvergedError, NotConvergedWarning, NotPositiveDefiniteError, Nystrom
from solvers.estimates.probes import signs
from tests.curvature import dense_reference as dense
from tests.curvature.laplace.problems import likelihood, loader_of, toy
from tests.curvature.problems import F64, PROBLEMS, Problem

NAMES = [
    "mlp_ce",
    "mlp_ce_all_options",
    "mlp_mse",
    "mlp_mse_one_number",
    "mlp_bce",
    "linear_on_sequences",
    "frozen_parts",
    "module_used_twice",
    "cnn",
    "encoder_pre_norm",
    "language_model",
    "two_inputs",
    "mapping_inputs",
]
KINDS = ["scalar", "layers", "diagonal"]


def posterior_of(problem: Problem, **options: Any) -> LinearizedLaplace:
    return LinearizedLaplace(problem.model, problem.loss_fn, problem.data, class_dim=problem.class_dim, **options)


def priors(model: nn.Module, kind: str) -> Tensor:
    tensors = list(dense.trainable(model).values())
    count = {"scalar": 1, "layers": len(tensors), "diagonal": sum(p.numel() for p in tensors)}[kind]
    return torch.linspace(0.4, 2.5, count, dtype=F64) if count > 1 else torch.tensor([0.7], dtype=F64)


def expanded(model: nn.Module, prior: Tensor) -> Tensor:
    """One number per parameter, from the definition of the shapes."""
    sizes = [p.numel() for p in dense.trainable(model).values()]
    if len(prior) == len(sizes) and len(sizes) > 1:
        return torch.cat([value.expand(n) for value, n in zip(prior, sizes, strict=True)])
    return prior.expand(sum(sizes))


class Dense:
    """The evidence from dense matrices."""

    def __init__(self, problem: Problem) -> None:
        self.model = problem.model
        self.regression = likelihood(problem) == "regression"
        factor = 0.5 if self.regression else 1.0
        summed = problem.with_loss(dense.summed(problem.loss_fn))
        self.H = factor * dense.ggn(summed)
        z, y = dense.dataset_outputs(summed, problem.model)
        self.loss = (factor * summed.loss_fn(z, y)).detach()
        self.observations = z.numel()
        self.theta = torch.cat([p.detach().flatten() for p in dense.trainable(problem.model).values()])

    def log_det(self, prior: Tensor, scale: Tensor | float) -> Tensor:
        P = expanded(self.model, prior)
        return torch.logdet(scale * self.H + P.diag()) - P.log().sum()

    def __call__(
        self, prior: Tensor, sigma: Tensor | float = 1.0, temperature: float = 1.0, mean: float = 0.0
    ) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=F64)
        scale = 1 / (sigma**2 * temperature)
        constant = self.observations * (sigma * math.sqrt(2 * math.pi)).log() if self.regression else 0.0
        scatter = (expanded(self.model, prior) * (self.theta - mean).square()).sum()
        return -scale * self.loss - constant - (scatter + self.log_det(prior, scale)) / 2

    def effective_dimension(self, prior: Tensor, scale: float) -> Tensor:
        """Of each parameter, the diagonal of ``aH (aH + P)^-1``."""
        P = expanded(self.model, prior).diag()
        return (scale * self.H @ torch.linalg.inv(scale * self.H + P)).diagonal()


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-8) -> None:
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_evidence_of_few_parameters_is_exact(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    reference, prior = Dense(problem), priors(problem.model, kind)
    numbers = {"temperature": 1.6} | ({"sigma_noise": 0.6} if reference.regression else {})
    found = evidence(posterior_of(problem, prior_precision=prior, prior_mean=0.2, **numbers), samples=10_000)
    expected = reference(prior, numbers.get("sigma_noise", 1.0), 1.6, mean=0.2)
    close(found.value.value, expected)
    scale = 1 / (numbers.get("sigma_noise", 1.0) ** 2 * 1.6)
    close(found.log_det_ratio.value, reference.log_det(prior, scale))
    close(found.effective_dimension.value, reference.effective_dimension(prior, scale).sum())
    assert float(found.value.stderr) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_evidence_is_that_of_laplace_torch(task: str, kind: str) -> None:
    model, x, y = toy(task)
    prior = priors(model, kind)
    options = {"sigma_noise": 0.7 if task == "regression" else 1.0, "temperature": 1.3, "prior_mean": 0.1}
    la = Laplace(model, task, "all", "full", backend=GGNBackend, prior_precision=prior, **options)
    la.fit(loader_of(x, y))
    posterior = LinearizedLaplace(model, task, loader_of(x, y), prior_precision=prior, **options)
    found = evidence(posterior, samples=100)
    close(found.value.value, la.log_marginal_likelihood())
    close(found.log_likelihood, la.log_likelihood)
    close(found.scatter, la.scatter)
    close(posterior.precision.to_dense(), la.posterior_precision)


@pytest.mark.parametrize("name", ["mlp_mse", "cnn", "language_model"])
def test_with_the_vectors_fixed_it_is_the_dense_quadratic_form(name: str) -> None:
    problem = PROBLEMS[name]()
    prior = priors(problem.model, "layers")
    posterior = posterior_of(problem, prior_precision=prior)
    # A single vector has no spread beside which fewer steps would do.
    found = StochasticEvidence(posterior, samples=1, steps=10_000, sketch=None)()
    P = expanded(problem.model, prior)
    values, vectors = torch.linalg.eigh(Dense(problem).H / (P * P[:, None]).sqrt())
    z = (signs(posterior.curvature, 1, torch.Generator().manual_seed(0)) @ vectors).flatten()
    close(found.log_det_ratio.value, z.square() @ values.clamp(min=0).log1p(), 1e-7)
    close(found.effective_dimension.value, z.square() @ (values / (1 + values)), 1e-7)
    assert found.value.stderr == math.inf


@pytest.mark.parametrize("name", ["mlp_mse", "mlp_ce", "encoder_pre_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_differences_of_the_dense_evidence(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    reference, prior = Dense(problem), priors(problem.model, kind)
    sigma = 0.6 if reference.regression else 1.0
    posterior = posterior_of(problem, prior_precision=prior, sigma_noise=sigma)

    def slope(function: Callable[[float], Tensor]) -> Tensor:
        return (function(1e-5) - function(-1e-5)) / 2e-5

    found = evidence(posterior, samples=10_000)
    close(found.prior_gradient.value, slope(lambda h: reference(prior * math.exp(h), sigma)), 1e-6)
    if reference.regression:
        assert found.noise_gradient is not None
        close(found.noise_gradient.value, slope(lambda h: reference(prior, sigma * math.exp(h))), 1e-6)
    else:
        assert found.noise_gradient is None
    gamma = posterior.prior.sums(reference.effective_dimension(prior, posterior.scale))
    each = posterior.prior_gradient(Estimate(gamma, 0 * gamma, 0, 0, 0 * gamma)).value
    for g in range(0, len(prior), 7):
        unit = torch.eye(len(prior), dtype=F64)[g]
        close(each[g], slope(lambda h, unit=unit: reference(prior * (h * unit).exp(), sigma)), 1e-6)


def test_gradients_are_those_of_the_estimate_itself() -> None:
    """The vectors stay the same, so what is tuned is a smooth function."""
    model, x, y = toy("regression")
    curve = StochasticEvidence(LinearizedLaplace(model, "regression", (x, y)), samples=4, steps=50)

    def at(h: float, k: float) -> Tensor:
        return curve(0.7 * math.exp(h), 0.5 * math.exp(k)).value.value

    found = curve(0.7, 0.5)
    assert found.noise_gradient is not None
    close(found.prior_gradient.value, (at(1e-5, 0) - at(-1e-5, 0)) / 2e-5, 1e-6)
    close(found.noise_gradient.value, (at(0, 1e-5) - at(0, -1e-5)) / 2e-5, 1e-6)


def test_hyperparameters_that_scale_cost_no_products() -> None:
    model, x, y = toy("regression")
    layers = priors(model, "layers")
    curve = StochasticEvidence(LinearizedLaplace(model, "regression", (x, y), prior_precision=layers), samples=6)
    curve()
    spent = curve.products
    assert 0 < spent <= 6 * 43 + 43
    for prior, sigma, temperature in ((3 * layers, 1.0, 1.0), (layers, 1.5, 1.0), (0.9 * layers, 1.1, 2.0)):
        found = curve(prior, sigma, temperature)
        fresh = StochasticEvidence(curve.posterior.at(prior, sigma, temperature), samples=6)()
        assert curve.products == spent
        close(found.value.value, fresh.value.value, 1e-3)  # settled at another number of steps
    curve(layers.flip(0))
    assert curve.products > spent


def test_a_quadrature_is_refined_where_it_is_too_coarse() -> None:
    model, x, y = toy("regression")
    posterior = LinearizedLaplace(model, "regression", (x, y), prior_precision=1e4)
    curve = StochasticEvidence(posterior, samples=6, sketch=None)
    curve()
    spent = curve.products
    found = curve(1e-2)
    assert curve.products > spent
    assert float(found.value.systematic) < 0.1 * float(found.value.stderr)


def known(posterior: LinearizedLaplace) -> LinearizedLaplace:
    """With the curvature as a matrix, for tests of many runs."""
    posterior.curvature = solvers.Dense(posterior.curvature.to_dense(), is_gram=True)
    return posterior


@pytest.mark.parametrize(("steps", "sketch"), [(10, None), (100, None), (100, Nystrom(3))])
def test_error_bars_mean_what_they_say(steps: int, sketch: Nystrom | None) -> None:
    """The truth within two standard errors in 95 % of runs; more where the quadrature's own error is counted in."""
    problem = PROBLEMS["mlp_mse"]()
    reference, prior = Dense(problem), torch.tensor([0.1], dtype=F64)
    posterior = known(posterior_of(problem, prior_precision=prior, sigma_noise=0.5))
    later = torch.tensor([0.3], dtype=F64)
    truths = [
        (reference(prior, 0.5), reference.effective_dimension(prior, 4.0).sum()),
        (reference(later, 0.7), reference.effective_dimension(later, 1 / 0.49).sum()),
    ]
    hits = torch.zeros(4)
    runs = 200
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        curve = StochasticEvidence(posterior, samples=8, steps=steps, sketch=sketch, generator=generator)
        found = [curve(), curve(later, 0.7)]
        assert steps < 43 or all(f.value.systematic <= 0.25 * f.value.stderr for f in found)
        pairs = [(f.value, t[0]) for f, t in zip(found, truths, strict=True)]
        pairs += [(f.effective_dimension, t[1]) for f, t in zip(found, truths, strict=True)]
        hits += torch.tensor([float((e.value - t).abs() <= 2 * e.stderr) for e, t in pairs])
    # 200 runs know a share of 95 % to 1.5 %
    assert ((hits / runs >= 0.91) & (hits / runs <= (0.985 if steps == 100 else 1.0))).all(), hits / runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_changes_the_error_and_not_the_mean(kind: str) -> None:
    """Each estimate moves by the deviation of the sketch from its trace; a sketch that has all leaves no error."""
    problem = PROBLEMS["mlp_ce"]()
    prior = priors(problem.model, kind)
    posterior = known(posterior_of(problem, prior_precision=prior))
    truth = Dense(problem).log_det(prior, 1.0)
    plain = StochasticEvidence(posterior, samples=12, steps=43, sketch=None)().log_det_ratio
    for rank in (2, 5, 43):
        sketch = Nystrom(rank)
        found = StochasticEvidence(posterior, samples=12, steps=43, sketch=sketch)
        value = found().log_det_ratio
        near = sketch.approximate(posterior.curvature).to_dense()
        P = expanded(problem.model, prior)
        s, U = torch.linalg.eigh(near / (P * P[:, None]).sqrt())
        z = signs(posterior.curvature, 12, torch.Generator().manual_seed(0)) @ U
        excess = (z.square() @ s.clamp(min=0).log1p()).mean() - s.clamp(min=0).log1p().sum()
        close(value.value, plain.value - excess, 1e-4)  # settled at other numbers of steps
        assert float(value.stderr) < float(plain.stderr)
        assert abs(value.value - truth) <= 3 * value.stderr + 1e-6
    assert float(value.stderr) < 1e-3 * float(plain.stderr) and found.products <= 43 + 12 * 43


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tuned_values_maximise_the_dense_evidence(task: str, temperature: float) -> None:
    model, x, y = toy(task)
    problem = Problem(model, nn.MSELoss() if task == "regression" else nn.CrossEntropyLoss(), [(x, y)])
    reference = Dense(problem)
    start = posterior_of(problem, prior_precision=30.0, temperature=temperature)
    tuned = optimize_evidence(start, samples=100, rtol=1e-9)
    prior, sigma = tuned.prior_precision.value, float(tuned.sigma_noise.value)
    best = reference(prior, sigma, temperature)
    for h in (-0.01, 0.01):
        assert reference(prior * math.exp(h), sigma, temperature) < best
        if task == "regression":
            assert reference(prior, sigma * math.exp(h), temperature) < best
    assert tuned.iterations < 40 and not tuned.at_bound.any()
    assert float(tuned.prior_precision.stderr) == float(tuned.sigma_noise.stderr) == 0
    close(evidence(tuned.posterior, samples=100).value.value, best)


def test_tuning_one_number_costs_one_run_of_lanczos() -> None:
    model, x, y = toy("regression")
    tuned = optimize_evidence(LinearizedLaplace(model, "regression", (x, y)), samples=5, steps=43, rtol=1e-8)
    assert tuned.prior_precision.products <= 5 * 43 + 43 < 5 * 43 * tuned.iterations


def test_errors_of_tuned_values() -> None:
    """At most what is reported, to first order: the truth is within two of them in 95 % of runs or more."""
    model, x, y = toy("regression")
    start = known(LinearizedLaplace(model, "regression", (x, y)))
    truth = optimize_evidence(start, samples=100, rtol=1e-9)
    hits, runs = torch.zeros(2), 80
    for seed in range(runs):
        found = optimize_evidence(
            start, samples=10, sketch=None, generator=torch.Generator().manual_seed(seed), rtol=1e-6
        )
        pairs = ((found.prior_precision, truth.prior_precision), (found.sigma_noise, truth.sigma_noise))
        hits += torch.tensor([float((e.value - t.value).abs() <= 2 * e.stderr) for e, t in pairs])
    assert (hits / runs >= 0.92).all(), hits / runs


@pytest.mark.parametrize("kind", ["layers", "diagonal"])
def test_tuning_several_numbers(kind: str) -> None:
    """Stationary for the dense evidence, up to the error of the samples; the noise too."""
    model, x, y = toy("regression")
    problem = Problem(model, nn.MSELoss(), [(x, y)])
    start = posterior_of(problem, prior_precision=priors(model, kind))
    # The diagonal has maxima at infinity; a few iterations show that it runs.
    limits = {"rtol": 1e-3} if kind == "layers" else {"max_iterations": 3, "on_failure": "warn"}
    with pytest.warns(NotConvergedWarning) if kind == "diagonal" else _nothing():
        tuned = optimize_evidence(start, samples=2000, **limits)
    prior, sigma = tuned.prior_precision.value, float(tuned.sigma_noise.value)
    reference = Dense(problem)
    gamma = reference.effective_dimension(prior, 1 / sigma**2)
    exact = tuned.posterior.prior.sums(gamma)
    assert ((tuned.effective_dimension.value - exact).abs() <= 5 * tuned.effective_dimension.stderr).all()
    if kind == "layers":
        close(prior * tuned.posterior.scatter(), tuned.effective_dimension.value, 2e-3)
        wanted = (2 * reference.loss / (36 - gamma.sum())).sqrt()
        assert abs(sigma - wanted) <= 5 * tuned.sigma_noise.stderr + 1e-3 * sigma
        assert reference(prior, sigma) > reference(start.prior.values)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_a_prior_that_wants_to_be_infinite_stops_at_its_bound() -> None:
    model = nn.Linear(2, 1, bias=True).double()
    nn.init.zeros_(model.bias)
    x = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    posterior = LinearizedLaplace(model, "regression", (x, x[:, :1]), prior_precision=torch.ones(2))
    tuned = optimize_evidence(posterior, samples=50, bounds=(1e-4, 1e4), rtol=1e-2)
    assert tuned.at_bound.tolist() == [False, True]
    close(tuned.prior_precision.value[1], 1e4, 0.02)


def test_what_cannot_be_is_refused() -> None:
    model, x, y = toy("regression")
    classes = toy("classification")
    with pytest.raises(ValueError, match=r"one per parameter tensor \(4\) or one per parameter \(43\), not of shape"):
        LinearizedLaplace(model, "regression", (x, y), prior_precision=torch.ones(5))
    with pytest.raises(ValueError, match="prior_precision is a finite number above 0, not -1"):
        LinearizedLaplace(model, "regression", (x, y), prior_precision=-1.0)
    with pytest.raises(ValueError, match="temperature is a finite number above 0, not 0"):
        LinearizedLaplace(model, "regression", (x, y), temperature=0.0)
    with pytest.raises(ValueError, match=r"sigma_noise=0.5 is for regression"):
        LinearizedLaplace(classes[0], "classification", classes[1:], sigma_noise=0.5)
    with pytest.raises(ValueError, match="'regression' or 'classification' or a loss, not 'ranking'"):
        LinearizedLaplace(model, "ranking", (x, y))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a sum of losses is no likelihood"):
        LinearizedLaplace(model, SumOfLosses({0: (1.0, nn.MSELoss())}), (x, y))
    with pytest.raises(ValueError, match="noise=True is for regression"):
        optimize_evidence(LinearizedLaplace(classes[0], "classification", classes[1:]), noise=True)
    posterior = LinearizedLaplace(model, "regression", (x, y))
    with pytest.raises(ValueError, match="samples is at least 1, not 0"):
        evidence(posterior, samples=0)
    with pytest.raises(NotConvergedError, match=r"still change by .* after 2 iterations"):
        optimize_evidence(posterior, samples=50, max_iterations=2, rtol=1e-8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'solver'"):
        optimize_evidence(posterior, solver=None)
    with pytest.raises(TypeError, match="one-shot iterator"):
        LinearizedLaplace(model, "regression", iter([(x, y)]))


def test_noise_that_nothing_tells_of_is_refused() -> None:
    """As many parameters as observations, a prior without weight: the model explains all."""
    model = nn.Linear(3, 1).double()
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    posterior = LinearizedLaplace(model, "regression", (x, x[:, :1]), prior_precision=1e-9, sigma_noise=1e-4)
    with pytest.raises(ValueError, match="the effective dimension is 4 for 4 observations"):
        optimize_evidence(posterior.at(1e-30))


@pytest.mark.filterwarnings("ignore:.*is not convex in the model's outputs")
def test_a_loss_that_is_not_convex_is_refused_where_it_matters() -> None:
    model, x, y = toy("regression")

    def saddle(z: Tensor, target: Tensor) -> Tensor:
        return (z[:, 0] ** 2 - z[:, 1] ** 2).sum()

    posterior = LinearizedLaplace(model, AutogradLoss(saddle, reduction="sum"), (x, y), prior_precision=1e6)
    exact = evidence(posterior, samples=100).value.value
    for samples, sketch in ((5, None), (5, Nystrom(4)), (100, Nystrom(4))):
        curve = StochasticEvidence(posterior, samples=samples, sketch=sketch)
        found = curve().value
        torch.testing.assert_close(found.value, exact, rtol=0, atol=5 * float(found.stderr) + 1e-9 * float(exact.abs()))
        with pytest.raises(NotPositiveDefiniteError, match="the loss is not convex in the outputs"):
            curve(1e-3)


def test_changed_parameters_are_refused() -> None:
    model, x, y = toy("regression")
    posterior = LinearizedLaplace(model, "regression", [(x, y)])
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="was changed after this operator was made"):
        evidence(posterior)


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    problem = PROBLEMS["encoder_pre_norm"]()
    before = {name: t.clone() for name, t in problem.model.state_dict().items()}
    state = torch.get_rng_state()
    posterior = posterior_of(problem)
    evidence(posterior, samples=3)
    PosteriorSampler(posterior, 3)()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in problem.model.state_dict().items())
    assert all(p.grad is None and not p._backward_hooks for p in problem.model.parameters())


def test_float32_models() -> None:
    model, x, y = toy("regression")
    exact = evidence(LinearizedLaplace(model, "regression", (x, y)), samples=100).value.value
    single = LinearizedLaplace(model.float(), "regression", (x.float(), y.float()))
    found = evidence(single, samples=100).value
    # A loss of about fifty, summed in float32.
    assert found.value.dtype == F64 and abs(found.value - exact) < 1e-4
