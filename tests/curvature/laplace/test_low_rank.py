"""Is the low-rank plus diagonal posterior the Gaussian that its matrix says, without that matrix?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace import Laplace

from curvature.laplace import (
    EFBackend,
    GGNBackend,
    HessianBackend,
    IndefinitePosteriorError,
    LastLayerLowRankDiagPosterior,
    LowRankDiagPosterior,
)
from tests.curvature import dense_reference as dense
from tests.curvature.laplace.problems import FromMapping, definition, loader_of, mapping_loader, summed, toy
from tests.curvature.problems import F64, classes, normal

BOTH = ["classification", "regression"]
SUBSETS = ["all", "last_layer"]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def fitted(task: str, subset: str = "all", rank: int | None = 4, batch_size: int = 5, **options: Any) -> Any:
    model, x, y = toy(task)
    kwargs = {"backend": GGNBackend, "backend_kwargs": {"low_rank": rank}} | options
    la = Laplace(model, task, subset, "low_rank_diag", **kwargs)
    la.fit(loader_of(x, y, batch_size))
    return la


def curvature(task: str, subset: str = "all") -> Tensor:
    """The Gauss-Newton matrix by definition, in laplace-torch's scale."""
    model, x, y = toy(task)
    loss = nn.CrossEntropyLoss(reduction="sum") if task == "classification" else nn.MSELoss(reduction="sum")
    problem = summed("mlp_ce").with_loss(loss)
    problem = type(problem)(model, loss, [(x, y)])
    G = (1.0 if task == "classification" else 0.5) * dense.ggn(problem)
    size = sum(p.numel() for p in list(model.parameters())[-2:])
    return G if subset == "all" else G[-size:, -size:]


def expected(G: Tensor, rank: int | None) -> Tensor:
    """V diag(s) V^T of the largest eigenvalues, with the diagonal of G."""
    values, vectors = torch.linalg.eigh(G)
    values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    low = vectors @ torch.diag(values) @ vectors.T
    return low + torch.diag((G - low).diagonal().clamp(min=0))


def precision(la: Any) -> Tensor:
    (V, s), d = la.posterior_precision
    return V @ torch.diag(s) @ V.T + torch.diag(d)


def test_it_is_known_by_its_name() -> None:
    model = toy()[0]
    assert type(Laplace(model, "classification", "all", "low_rank_diag")) is LowRankDiagPosterior
    last = Laplace(model, "classification", "last_layer", "low_rank_diag")
    assert type(last) is LastLayerLowRankDiagPosterior and issubclass(last._backend_cls, GGNBackend)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("task", BOTH)
@pytest.mark.parametrize("rank", [3, 6, None])  # regression has every eigenvalue of the last layer three times
def test_precision(task: str, subset: str, rank: int | None) -> None:
    noise = {"sigma_noise": 0.7} if task == "regression" else {}
    la = fitted(task, subset, rank, prior_precision=1.5, temperature=0.9, **noise)
    G = curvature(task, subset)
    factor = 1 / (0.9 * (0.49 if noise else 1.0))
    close(precision(la), factor * expected(G, rank) + 1.5 * torch.eye(len(G), dtype=F64))
    close(la.H.vectors.square() @ la.H.values + la.H.rest, G.diagonal())  # the diagonal is that of the curvature
    if rank is None:
        close(precision(la), factor * G + 1.5 * torch.eye(len(G), dtype=F64))
    else:
        assert la.H.vectors.shape[1] == rank and la.H.rest.max() > 0


@pytest.mark.parametrize("name", ["cnn", "frozen_parts", "mlp_mse", "language_model"])
@pytest.mark.parametrize("kind", [GGNBackend, EFBackend])
def test_other_models_and_backends(name: str, kind: type) -> None:
    problem = summed(name)
    task = "regression" if isinstance(problem.loss_fn, nn.MSELoss) else "classification"
    la = Laplace(problem.model, task, "all", "low_rank_diag", backend=kind, backend_kwargs={"low_rank": 3})
    la.backend.lossfunc = problem.loss_fn
    la.fit(_Loader(problem.data))
    C = definition(problem, kind)
    values = torch.linalg.eigvalsh(C)
    assert values[-4] < 0.999 * values[-3]  # the three are determined
    close(precision(la) - torch.eye(len(C), dtype=F64), expected(C, 3), 1e-8)


class _Loader:
    def __init__(self, data: Any) -> None:
        self.data, self.dataset = data, range(sum(len(y) for _, y in data))

    def __iter__(self) -> Any:
        return iter(self.data)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("task", BOTH)
def test_evidence_and_its_gradients(task: str, subset: str) -> None:
    """From the matrix, and by finite differences, in the prior precision of every parameter and in the noise."""
    la = fitted(task, subset)
    P = len(la.mean)
    prior = torch.linspace(0.5, 2.0, P, dtype=F64)
    noise = (torch.tensor(1.3, dtype=F64),) if task == "regression" else ()
    evidence = la.log_marginal_likelihood(prior, *noise)
    log_det = torch.logdet(precision(la)) - prior.log().sum()
    close(evidence, la.log_likelihood - (log_det + (prior * la.mean.square()).sum()) / 2)
    numbers = [t.clone().requires_grad_() for t in (prior, *noise)]
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, numbers)
    one = [t.clone().requires_grad_() for t in (torch.tensor([0.7], dtype=F64), *noise)]
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, one)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("task", BOTH)
def test_predictions(task: str, subset: str) -> None:
    la = fitted(task, subset, prior_precision=2.0)
    model, x, _ = toy(task)
    J = GGNBackend(model, task).jacobians(x)[0][..., -len(la.mean) :]
    covariance = torch.linalg.inv(precision(la))
    close(la.functional_variance(J), J @ covariance @ J.mT)
    flat = J.flatten(0, 1)
    close(la.functional_covariance(J), flat @ covariance @ flat.T)
    if task == "regression":
        close(la(x)[1], J @ covariance @ J.mT)
        close(la(x, joint=True)[1], flat @ covariance @ flat.T)
        close(la(x, diagonal_output=True)[1], (J @ covariance @ J.mT).diagonal(dim1=1, dim2=2))
    else:
        scaled = model(x).detach() / (1 + torch.pi / 8 * (J @ covariance @ J.mT).diagonal(dim1=1, dim2=2)).sqrt()
        close(la(x), scaled.softmax(-1), 1e-7)  # laplace-torch has pi from float32 tensors
    assert la(x, pred_type="nn", link_approx="mc", n_samples=3) is not None
    value = la.mean + normal(len(la.mean))
    delta = value - la.mean
    close(la.square_norm(value), delta @ precision(la) @ delta)
    log_prob = torch.distributions.MultivariateNormal(la.mean, precision_matrix=precision(la)).log_prob(value)
    close(la.log_prob(value), log_prob)


def test_samples_are_a_root_of_the_covariance() -> None:
    """Exact: the map from noise to samples, which is linear, times its transpose."""
    la = fitted("regression", rank=3, prior_precision=0.8)
    P = len(la.mean)
    low_rank, root = la._whitened()
    S = la._power(low_rank, torch.eye(P, dtype=F64), -0.5) / root
    close(S.T @ S, torch.linalg.inv(precision(la)))
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(7, P, dtype=F64, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    close(la.sample(7, generator), la.mean + noise @ S)
    assert torch.equal(torch.get_rng_state(), state)


def test_any_batches_give_the_same_posterior() -> None:
    close(precision(fitted("classification", batch_size=12)), precision(fitted("classification", batch_size=5)))


def test_a_sampled_fisher_draws_once() -> None:
    """Diagonal and eigenvalues are those of one matrix, so that all eigenvalues leave nothing for the rest."""
    la = fitted("classification", rank=None, backend_kwargs={"stochastic": True, "num_samples": 2})
    diagonal = la.H.vectors.square() @ la.H.values
    assert la.H.rest.max() < 1e-9 * diagonal.max()
    assert la.backend.sampled == 3  # batches, not twice as many


def test_hessian() -> None:
    """Negative entries of the diagonal that is left are cut off, so the posterior is one; its evidence is no longer
    that of the Hessian where an eigenvalue is more negative than the prior is positive."""
    model, x, y = toy("regression")
    la = Laplace(model, "regression", "all", "low_rank_diag", backend=HessianBackend, backend_kwargs={"low_rank": 3})
    la.fit(loader_of(x, y))
    values = torch.linalg.eigvalsh(precision(la))
    assert values.min() >= 1 - 1e-9
    with pytest.raises(IndefinitePosteriorError, match="not positive definite"):
        la.log_marginal_likelihood()
    lowest = float(torch.linalg.eigvalsh(la.backend.full(x, y)[1]).min())
    assert math.isfinite(la.log_marginal_likelihood(torch.tensor([1.01 * -lowest])))


def test_large_eigenvalues_in_float32() -> None:
    """The algebra adds no error where eigenvalues are seven powers of ten above the prior."""
    model, x, y = toy("regression")
    la = Laplace(model.float(), "regression", "all", "low_rank_diag", sigma_noise=1e-3, backend=GGNBackend)
    la.fit(loader_of(x.float(), y.float()))
    (V, s), d = la.posterior_precision
    assert s[0] > 1e7 and d.dtype == torch.float32
    V, s, d = V.double(), s.double(), d.double()
    matrix = V @ torch.diag(s) @ V.T + torch.diag(d)
    J = normal(4, 3, len(d)).float()
    variance = la.functional_variance(J)
    assert variance.dtype == torch.float32
    expected = J.double() @ torch.linalg.inv(matrix) @ J.double().mT
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=1e-5)  # float32 of the result
    log_det = la.log_det_posterior_precision
    torch.testing.assert_close(log_det.double(), torch.logdet(matrix), rtol=1e-6, atol=0)


def test_mappings() -> None:
    torch.manual_seed(0)
    model, x, y = FromMapping().double(), normal(7, 4), classes(7, of=3)
    keys = {"dict_key_x": "inputs", "dict_key_y": "labels"}
    la = Laplace(model, "classification", "all", "low_rank_diag", backend=GGNBackend, **keys)
    la.fit(mapping_loader(x, y))
    plain = Laplace(model.net, "classification", "all", "low_rank_diag", backend=GGNBackend)
    plain.fit(loader_of(2 * x, y))
    close(precision(la), precision(plain))


def test_no_matrix_of_all_parameters_is_formed() -> None:
    """30000 parameters: a matrix of them would be 3.6 GB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 290), nn.Tanh(), nn.Linear(290, 2))
    x, y = torch.randn(6, 100), classes(6, of=2)
    la = Laplace(model, "classification", "all", "low_rank_diag", backend_kwargs={"low_rank": 4})
    la.fit(loader_of(x, y))
    assert la(x).shape == (6, 2) and la.sample(2).shape == (2, len(la.mean)) and len(la.mean) > 29000
    assert torch.isfinite(la.log_marginal_likelihood())


def test_refusals() -> None:
    model, x, y = toy()
    la = Laplace(model, "classification", "all", "low_rank_diag")
    with pytest.raises(AttributeError, match="not fitted"):
        la.posterior_precision  # noqa: B018
    with pytest.raises(ValueError, match="cannot be extended"):
        la.fit(loader_of(x, y), override=False)


@pytest.mark.parametrize("subset", SUBSETS)
def test_saved_by_laplace_torch(subset: str, tmp_path: Any) -> None:
    la = fitted("regression", subset, sigma_noise=0.8)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    model, x, _ = toy("regression")
    loaded = Laplace(model, "regression", subset, "low_rank_diag", backend=GGNBackend)
    loaded.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=False))
    assert torch.equal(loaded(x)[1], la(x)[1])


@pytest.mark.parametrize("task", BOTH)
def test_evidence_without_the_rest_is_an_upper_bound(task: str) -> None:
    """What the documentation says of "low_rank"; and all eigenvalues leave no difference."""
    model, x, y = toy(task)
    found = {}
    for structure, rank in (("full", None), ("low_rank", 4), ("low_rank_diag", 4), ("low_rank_diag", None)):
        kwargs = {} if structure == "full" else {"low_rank": rank}
        la = Laplace(model, task, "all", structure, backend=GGNBackend, backend_kwargs=kwargs)
        la.fit(loader_of(x, y))
        found[structure, rank] = la.log_marginal_likelihood()
    exact = found["full", None]
    assert found["low_rank_diag", 4] < exact < found["low_rank", 4]
    close(found["low_rank_diag", None], exact)
