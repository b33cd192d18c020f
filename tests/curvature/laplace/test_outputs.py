"""Images and tokens through laplace-torch, and what is refused there: one class, two class axes, no Gaussian."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace import DiagLaplace, FullLaplace, Laplace, marglik_training
from laplace.curvature import CurvlinopsHessian

from curvature.laplace import (
    EFBackend,
    GGNBackend,
    HessianBackend,
    IndefinitePosteriorError,
    LinearizedLaplace,
    OnlineLaplace,
    evidence,
    load,
    save,
)
from curvature.losses import AmbiguousClassAxisError, AutogradLoss
from tests.curvature.laplace.problems import loader_of, toy
from tests.curvature.problems import F64, classes, normal

STRUCTURES = ["full", "diag", "kron", "kfac", "ekfac", "diagonal", "low_rank", "low_rank_diag"]


def build(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def images() -> tuple[nn.Module, Tensor, Tensor, int]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1))
        return model, normal(5, 2, 2, 4), classes(5, 2, 4, of=3), 1


def tokens() -> tuple[nn.Module, Tensor, Tensor, int]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), normal(5, 4, 3), classes(5, 4, of=3), 2


PROBLEMS = {"images": images, "tokens": tokens}


def jacobians(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and Jacobians ``(M, *output, P)``, row by row."""
    f, params = model(x), list(model.parameters())
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in f.flatten()]
    return f.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*f.shape, -1)


def dense_ggn(f: Tensor, J: Tensor, axis: int) -> Tensor:
    """The Gauss-Newton matrix of cross-entropy, a sum over the positions."""
    f, J = f.movedim(axis, -1).flatten(0, -2), J.movedim(axis, -2).flatten(0, -3)
    total = torch.zeros(J.shape[-1], J.shape[-1], dtype=F64)
    for logits, rows in zip(f, J, strict=True):
        p = logits.softmax(0)
        total += rows.T @ (torch.diag(p) - torch.outer(p, p)) @ rows
    return total


@pytest.mark.parametrize("name", PROBLEMS)
def test_probabilities_of_positions_by_dense_matrices(name: str) -> None:
    model, x, y, axis = PROBLEMS[name]()
    la: Any = Laplace(model, "classification", "all", "full", prior_precision=2.0, backend=GGNBackend)
    la.fit(loader_of(x, y, 3))
    f, J = jacobians(model, x)
    precision = dense_ggn(f, J, axis) + 2 * torch.eye(J.shape[-1], dtype=F64)
    torch.testing.assert_close(la.posterior_precision, precision, rtol=1e-9, atol=1e-9)
    covariance = torch.linalg.inv(precision)
    loss = nn.functional.cross_entropy(f.movedim(axis, 1), y, reduction="sum")
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    evidence = -loss - theta @ theta - (torch.logdet(precision) - len(theta) * math.log(2)) / 2
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)

    variances = torch.einsum("...p,pq,...q->...", J, covariance, J)
    probit = (f / (1 + math.pi / 8 * variances).sqrt()).softmax(axis)
    torch.testing.assert_close(la(x), probit, rtol=1e-9, atol=1e-12)
    # laplace-torch's own rules, on a model of one position at a time.
    for link in ("bridge", "bridge_norm"):
        got = la(x, link_approx=link).movedim(axis, -1).flatten(0, -2)
        rows, means = J.movedim(axis, -2).flatten(0, -3), f.movedim(axis, -1).flatten(0, -2)
        for i in (0, 7, 13):
            one = copy.copy(la)
            one.class_axis = None
            one.backend.jacobians = lambda *_, i=i, rows=rows, means=means, **__: (
                rows[i : i + 1],
                means[i : i + 1].clone(),
            )
            try:
                torch.testing.assert_close(got[i : i + 1], one(x[:1], link_approx=link), rtol=1e-9, atol=1e-12)
            finally:
                del one.backend.jacobians

    draws = la.functional_samples(x, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    flat = (draws - f).flatten(1)
    rows = J.flatten(0, -2)
    joint = rows @ covariance @ rows.T  # positions of an example, and examples, share the draw
    assert (flat.T @ flat / len(flat) - joint).abs().max() < 0.06 * joint.diagonal().max()
    probabilities = la(x, link_approx="mc", n_samples=4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probabilities, draws.softmax(axis + 1).mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(probabilities.sum(axis), torch.ones(y.shape, dtype=F64))
    alone = la.functional_samples(x, n_samples=20_000, diagonal_output=True) - f
    torch.testing.assert_close(alone.square().mean(0), variances, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm", "mc"])
def test_a_model_fitted_on_every_position_is_asked_about_the_last(link: str) -> None:
    model, x, y, _ = tokens()
    la: Any = Laplace(model, "classification", "all", "full", prior_precision=2.0, backend=GGNBackend)
    la.fit(loader_of(x, y, 3))
    draws = [torch.Generator().manual_seed(0) if link == "mc" else None for _ in range(2)]
    of_all = la(x[:, -1:], link_approx=link, generator=draws[0])
    of_last = la(x[:, -1], link_approx=link, generator=draws[1])
    torch.testing.assert_close(of_last, of_all[:, 0])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_predicts_positions(name: str, structure: str, tmp_path: Path) -> None:
    """By its own covariance of the parameters; before and after a file; on a grid; and through drawn networks."""
    model, x, y, axis = PROBLEMS[name]()
    la: Any = Laplace(model, "classification", "all", structure, prior_precision=2.0, backend=GGNBackend)
    la.fit(loader_of(x, y, 3))
    f, J = jacobians(model, x)
    variances = la.functional_variance(J.flatten(0, -2).unsqueeze(1)).view(f.shape)
    torch.testing.assert_close(la(x), (f / (1 + math.pi / 8 * variances).sqrt()).softmax(axis))
    drawn = la(x, pred_type="nn", link_approx="mc", n_samples=3, generator=torch.Generator().manual_seed(1))
    copied, total = copy.deepcopy(model), torch.zeros_like(f)
    for sample in la.sample(3, torch.Generator().manual_seed(1)):
        nn.utils.vector_to_parameters(sample, copied.parameters())
        total += copied(x).detach().softmax(axis) / 3
    torch.testing.assert_close(drawn, total)
    torch.testing.assert_close(model(x), f)  # the weights are put back
    save(la, tmp_path / "la.safetensors")
    other = Laplace(copy.deepcopy(model), "classification", "all", structure, backend=GGNBackend)
    other.load_state_dict(la.state_dict())
    for loaded in (load(tmp_path / "la.safetensors", copy.deepcopy(model)), other):
        assert torch.equal(loaded(x), la(x))
    grid = {"method": "gridsearch", "val_loader": loader_of(x, y), "grid_size": 3}
    with pytest.warns(UserWarning, match="By default `link_approx`"):
        la.optimize_prior_precision(**grid, log_prior_prec_min=-1, log_prior_prec_max=1)
    scores = {}
    for prior in (0.1, 1.0, 10.0):
        la.prior_precision, kept = prior, la.prior_precision
        scores[prior] = nn.functional.nll_loss(la(x).movedim(axis, 1).log(), y).item()
        la.prior_precision = kept
    assert math.isclose(float(la.prior_precision), min(scores, key=scores.__getitem__), rel_tol=1e-6)


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_regression_counts_every_number_of_an_example(structure: str) -> None:
    """The same posterior as with the outputs flattened, whose noise is on each of them."""
    model, x, y = tokens()[0], normal(5, 4, 3), normal(5, 4, 3)
    flattened = nn.Sequential(copy.deepcopy(model), nn.Flatten())
    kinds: Any = (model, y), (flattened, y.flatten(1))
    pair = [Laplace(m, "regression", "all", structure, sigma_noise=0.5, backend=GGNBackend) for m, _ in kinds]
    for la, (_, target) in zip(pair, kinds, strict=True):
        la.fit(loader_of(x, target))
    torch.testing.assert_close(pair[0].log_likelihood, pair[1].log_likelihood)
    if structure == "full":
        torch.testing.assert_close(pair[0].log_marginal_likelihood(), pair[1].log_marginal_likelihood())
        torch.testing.assert_close(pair[0](x)[1], pair[1](x)[1])
        draws = [la.functional_samples(x, n_samples=4000, generator=torch.Generator().manual_seed(0)) for la in pair]
        torch.testing.assert_close(draws[0].flatten(2).var(0), draws[1].var(0), rtol=0.2, atol=0.02)


@pytest.mark.parametrize("kind", [GGNBackend, EFBackend, HessianBackend])
def test_two_axes_that_may_hold_the_classes(kind: type) -> None:
    model, x, y = images()[0], normal(4, 2, 3, 3), classes(4, 3, 3, of=3)
    with pytest.raises(AmbiguousClassAxisError, match=r"backend_kwargs=\{'class_dim': 1\} or \{'class_dim': 3\}"):
        Laplace(model, "classification", "all", "diag", backend=kind).fit(loader_of(x, y))
    found = []
    for axis in (1, 3):
        la: Any = Laplace(model, "classification", "all", "diag", backend=kind, backend_kwargs={"class_dim": axis})
        la.fit(loader_of(x, y))
        expected = nn.functional.cross_entropy(model(x).movedim(axis, 1), y, reduction="sum")
        torch.testing.assert_close(-la.log_likelihood, expected.detach())
        found.append(la.H)
    assert not torch.allclose(*found)


ONE = {
    "column of numbers": (normal(8, 4), (normal(8, 1) > 0).double()),
    "labels": (normal(8, 4), torch.zeros(8, dtype=torch.long)),
}


@pytest.mark.parametrize("targets", ONE)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("kind", [GGNBackend, EFBackend, HessianBackend])
def test_one_logit_is_no_classification(targets: str, subset: str, kind: type) -> None:
    x, y = ONE[targets]
    for structure in ("full", "diag", "low_rank") if subset == "all" else ("full", "diag"):
        la = Laplace(
            build(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), "classification", subset, structure, backend=kind
        )
        with pytest.raises(ValueError, match=r"which has one: .* nn.BCEWithLogitsLoss"):
            la.fit(loader_of(x, y))


def test_several_labels_at_once_are_no_classification() -> None:
    x, y = normal(6, 4), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]] * 3, dtype=F64)
    for structure in ("full", "kfac"):
        la = Laplace(toy()[0], "classification", "all", structure, backend=GGNBackend)
        with pytest.raises(ValueError, match=r"add up to between 1 and 2, .*LinearizedLaplace"):
            la.fit(loader_of(x, y))


def off_a_minimum(structure: str, subset: str = "all", **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A Hessian with negative eigenvalues, and negative entries on its diagonal."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x, y = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 2 * normal(8, 4), 5 * normal(8, 3)
    la: Any = Laplace(model, "regression", subset, structure, prior_precision=0.1, backend=HessianBackend, **options)
    la.fit(loader_of(x, y))
    return la, x, y


@pytest.mark.parametrize("structure", ["full", "diag", "diagonal", "low_rank", "low_rank_diag"])
def test_no_evidence_of_an_indefinite_hessian(structure: str, tmp_path: Path) -> None:
    """Whatever the sign of its determinant; with a prior that makes it definite there is one, by the dense matrix."""
    la, x, y = off_a_minimum(structure)
    H = la.backend.full(x, y)[1]
    values = H.diagonal() if structure.startswith("diag") and structure != "full" else torch.linalg.eigvalsh(H)
    assert values.min() < -0.2
    words = "not positive definite .*no evidence"
    save(la, tmp_path / "la.safetensors")
    other = Laplace(copy.deepcopy(la.model), "regression", "all", structure, backend=HessianBackend)
    other.load_state_dict(la.state_dict())
    for posterior in (la, load(tmp_path / "la.safetensors", la.model), other):
        for prior in (0.1, -0.999 * float(values.min())):  # an even and an odd number below zero among them
            with pytest.raises(IndefinitePosteriorError, match=words):
                posterior.log_marginal_likelihood(torch.tensor([prior], dtype=F64))
    with pytest.raises(IndefinitePosteriorError, match=words):
        la.optimize_prior_precision(method="marglik", n_steps=2, init_prior_prec=0.1)
    if "low_rank" not in structure:
        for method in (lambda: la(x), lambda: la.sample(2), lambda: la.functional_samples(x), la.log_prob):
            with pytest.raises(IndefinitePosteriorError, match=words):
                method(la.mean) if method == la.log_prob else method()
    prior = -1.01 * float(values.min())
    found = la.log_marginal_likelihood(torch.tensor([prior], dtype=F64))
    if structure in ("full", "diag", "diagonal"):
        kept = torch.diag(H.diagonal()) if structure != "full" else H
        assert bool(torch.linalg.eigvalsh(kept + prior * torch.eye(len(H), dtype=F64)).min() > 0)
        expected = torch.linalg.slogdet(kept / prior + torch.eye(len(H), dtype=F64))
        torch.testing.assert_close(la.log_det_ratio, expected.logabsdet)
    assert math.isfinite(found)


def test_an_even_number_of_negative_eigenvalues_looks_like_any_other() -> None:
    """The determinant alone says nothing: this is the number that was returned."""
    la, x, y = off_a_minimum("full")
    values = torch.linalg.eigvalsh(la.backend.full(x, y)[1])
    assert values[1] < -0.1 and values[2] - values[1] > 1e-3
    la.prior_precision = float(-(values[1] + values[2]) / 2)  # two stay below zero
    assert torch.linalg.slogdet(la.posterior_precision).sign == 1
    with pytest.raises(IndefinitePosteriorError, match="smallest eigenvalue -"):
        la.log_marginal_likelihood()


@pytest.mark.parametrize("kind", [FullLaplace, DiagLaplace])
def test_classes_of_laplace_torch_themselves_refuse(kind: type) -> None:
    la, x, y = off_a_minimum("full")
    own = kind(la.model, "regression", prior_precision=0.1, backend=HessianBackend)
    own.fit(loader_of(x, y))
    with pytest.raises(IndefinitePosteriorError, match="not positive definite"):
        own.log_marginal_likelihood()


def test_tuning_and_tasks_off_a_minimum() -> None:
    """A grid passes over the priors that are too small, and says so if none is left; the prior stays as it was."""
    la, x, y = off_a_minimum("full", sigma_noise=0.5)
    lowest = 4 * float(torch.linalg.eigvalsh(la.backend.full(x, y)[1]).min())
    grid = {"method": "gridsearch", "val_loader": loader_of(x, y), "log_prior_prec_base": 10.0}
    la.optimize_prior_precision(**grid, log_prior_prec_min=-2, log_prior_prec_max=4, grid_size=4)
    assert float(la.prior_precision) > -lowest
    before = la.prior_precision
    with pytest.raises(IndefinitePosteriorError):
        la.optimize_prior_precision(**grid, log_prior_prec_min=-3, log_prior_prec_max=-2, grid_size=2)
    assert torch.equal(la.prior_precision, before)
    with pytest.raises(IndefinitePosteriorError, match="not positive definite"):
        marglik_training(
            copy.deepcopy(la.model), loader_of(x, y), "regression", "full", HessianBackend,
            optimizer_kwargs={"lr": 1e-6}, n_epochs=1, n_hypersteps=1, prior_prec_init=0.1,
        )  # fmt: skip
    online = OnlineLaplace(Laplace(la.model, "regression", "all", "full", prior_precision=0.1, backend=HessianBackend))
    with pytest.raises(IndefinitePosteriorError, match="not positive definite"):
        online.update(loader_of(x, y))
    assert online.tasks == 0 and float(online.penalty().detach()) > 0


@pytest.mark.filterwarnings("ignore:.*is not convex in the model's outputs")
def test_last_layer_and_matrix_free() -> None:
    la, _, _ = off_a_minimum("full", "last_layer")  # linear in the last layer, so its Hessian is positive
    assert math.isfinite(la.log_marginal_likelihood())
    x, y = normal(6, 1) / 10, torch.full((6, 1), 3.0, dtype=F64)

    loss = AutogradLoss(lambda z, t: (t * z.cos()).sum(), reduction="sum")
    posterior = LinearizedLaplace(build(nn.Linear(1, 2), nn.Linear(2, 1)), loss, (x, y), prior_precision=0.1)
    with pytest.raises(ValueError, match=r"not positive|convex"):
        evidence(posterior)


def test_other_backends_are_left_alone() -> None:
    la, x, y = off_a_minimum("full")
    own: Any = Laplace(la.model, "regression", "all", "full", prior_precision=0.1, backend=CurvlinopsHessian)
    own.fit(loader_of(x, y))
    torch.testing.assert_close(own.log_det_posterior_precision, own.posterior_precision.logdet(), equal_nan=True)
    assert "class_axis" not in own.state_dict()


def test_posteriors_over_functions_refuse_one_class() -> None:
    x, y = normal(8, 4), torch.zeros(8, dtype=torch.long)
    model = build(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    options: Any = {"backend": GGNBackend, "functional_approximation": "nystrom", "subsample_size": 4}
    la = Laplace(model, "classification", "all", "gp", n_eigenvalues=2, **options)
    with pytest.raises(ValueError, match="which has one"):
        la.fit(loader_of(x, y))


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_densities_of_a_subnetwork(structure: str) -> None:
    model, x, y = toy("regression")
    chosen = torch.tensor([0, 3, 17, 30])
    la: Any = Laplace(model, "regression", "subnetwork", structure, subnetwork_indices=chosen, backend=GGNBackend)
    la.fit(loader_of(x, y))
    value = la.mean + torch.arange(len(la.mean)).double().sin()
    P = la.posterior_precision if structure == "full" else torch.diag(la.posterior_precision)
    normal_one = torch.distributions.MultivariateNormal(la.mean[chosen], precision_matrix=P)
    torch.testing.assert_close(la.log_prob(value), normal_one.log_prob(value[chosen]))
    squared = (value - la.mean)[chosen] @ P @ (value - la.mean)[chosen]
    torch.testing.assert_close(la.square_norm(value), squared)
    torch.testing.assert_close(la.log_prob(value, normalized=False), -squared / 2)
