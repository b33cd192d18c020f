"""Does laplace-torch work with the backends and posteriors from end to end, and with the right numbers?"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace import KronLaplace, Laplace
from laplace.baselaplace import ELLA
from laplace.curvature import CurvlinopsGGN
from laplace.lllaplace import KronLLLaplace
from laplace.marglik_training import marglik_training

from curvature.laplace import (
    EFBackend,
    EKFACLaplace,
    GGNBackend,
    HessianBackend,
    KFACLaplace,
    LastLayerEKFACLaplace,
    LastLayerKFACLaplace,
    LowRankPosterior,
)
from tests.curvature.laplace.problems import FromMapping, definition, likelihood, loader_of, mapping_loader, summed, toy
from tests.curvature.problems import F64, Problem, classes, normal

ALL = ["full", "diag", "kron", "kfac", "ekfac", "low_rank"]
STRUCTURES = [*(("all", s) for s in ALL), *(("last_layer", s) for s in ("full", "diag", "kron", "kfac", "ekfac"))]
BOTH = ["classification", "regression"]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def fitted(task: str, subset: str, structure: str, batch_size: int = 5, **options: Any) -> Any:
    model, x, y = toy(task)
    la = Laplace(model, task, subset, structure, **({"backend": GGNBackend} | options))
    la.fit(loader_of(x, y, batch_size))
    return la


def precision(la: Any) -> Tensor:
    """The posterior precision as a matrix."""
    P = la.posterior_precision
    if isinstance(P, tuple):
        (U, values), prior = P
        return U @ torch.diag(values) @ U.T + torch.diag(prior)
    return P.to_matrix() if hasattr(P, "to_matrix") else torch.diag(P) if P.dim() == 1 else P


def test_structures_are_known_by_their_names() -> None:
    """And those of laplace-torch are what they were."""
    model = toy()[0]
    expected = {
        ("all", "kron"): KronLaplace,
        ("last_layer", "kron"): KronLLLaplace,
        ("all", "kfac"): KFACLaplace,
        ("all", "ekfac"): EKFACLaplace,
        ("all", "low_rank"): LowRankPosterior,
        ("last_layer", "kfac"): LastLayerKFACLaplace,
        ("last_layer", "ekfac"): LastLayerEKFACLaplace,
    }
    for key, kind in expected.items():
        assert type(Laplace(model, "classification", *key)) is kind


@pytest.mark.parametrize("subset,structure", STRUCTURES)
@pytest.mark.parametrize("task", BOTH)
def test_evidence_and_its_gradients(task: str, subset: str, structure: str) -> None:
    """From the posterior precision by definition, and by finite differences."""
    la = fitted(task, subset, structure)
    prior, sigma = torch.tensor([0.7], dtype=F64), torch.tensor(1.3 if task == "regression" else 1.0, dtype=F64)
    noise = sigma if task == "regression" else None
    evidence = la.log_marginal_likelihood(prior, noise)
    scatter = 0.7 * la.mean.square().sum()
    log_det = torch.logdet(precision(la)) - len(la.mean) * prior.log().sum()
    close(evidence, la.log_likelihood - (log_det + scatter) / 2)
    layers = prior.repeat(la.n_layers) if subset == "all" else prior  # one number per parameter tensor
    numbers = (layers.requires_grad_(), *([sigma.requires_grad_()] if noise is not None else []))
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, numbers)


@pytest.mark.parametrize("subset,structure", STRUCTURES)
@pytest.mark.parametrize("task", BOTH)
def test_any_batches_give_the_same_posterior(task: str, subset: str, structure: str) -> None:
    a, b = fitted(task, subset, structure, batch_size=12), fitted(task, subset, structure, batch_size=5)
    close(precision(a), precision(b))
    close(a.loss, b.loss)


@pytest.mark.filterwarnings("ignore:By default `link_approx`:UserWarning")
@pytest.mark.parametrize("subset,structure", STRUCTURES)
@pytest.mark.parametrize("task", BOTH)
def test_predictions(task: str, subset: str, structure: str) -> None:
    la = fitted(task, subset, structure, prior_precision=2.0)
    model, x, y = toy(task)
    J = GGNBackend(model, task).jacobians(x)[0][..., -len(la.mean) :]
    variance = J @ torch.linalg.inv(precision(la)) @ J.mT
    f = model(x).detach()
    if task == "regression":
        mean, covariance = la(x)
        close(mean, f)
        close(covariance, variance)
        close(la(x, diagonal_output=True)[1], variance.diagonal(dim1=1, dim2=2))
        flat = J.flatten(0, 1)
        close(la(x, joint=True)[1], flat @ torch.linalg.inv(precision(la)) @ flat.T)
        assert la(x, pred_type="nn", link_approx="mc", n_samples=3)[0].shape == f.shape
    else:
        scaled = f / (1 + torch.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
        close(la(x), scaled.softmax(-1), 1e-7)  # laplace-torch has pi from float32 tensors
        for link in ("mc", "bridge", "bridge_norm"):
            close(la(x, link_approx=link, n_samples=3).sum(-1), torch.ones(12, dtype=F64), 1e-6)
        close(la(x, pred_type="nn", link_approx="mc", n_samples=3).sum(-1), torch.ones(12, dtype=F64), 1e-6)
    assert la.predictive_samples(x, n_samples=4).shape == (4, 12, 3)
    if structure != "low_rank":
        torch.manual_seed(0)
        samples = la.sample(20000) - la.mean
        # The sampling error of an entry of the covariance is about 1 / sqrt(20000) of the variances, 5 of them here.
        inverse = torch.linalg.inv(precision(la))
        assert (samples.T @ samples / 20000 - inverse).abs().max() < 0.04 * inverse.diagonal().max()
    la.optimize_prior_precision(pred_type="glm", method="marglik", n_steps=3)
    la.optimize_prior_precision(pred_type="glm", method="gridsearch", val_loader=loader_of(x, y), grid_size=3)
    if subset == "all":
        assert torch.equal(torch.nn.utils.parameters_to_vector(la.model.parameters()), la.mean)


@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse", "cnn", "encoder_pre_norm", "residual_eval"])
@pytest.mark.parametrize("kind", [GGNBackend, EFBackend])
def test_ekfac_has_the_diagonal_of_the_curvature_in_the_basis_of_kfac(name: str, kind: type) -> None:
    problem = summed(name)
    loader: Any = Batches(problem)
    exact = definition(problem, kind)
    kfac, ekfac = (Laplace(problem.model, likelihood(problem), "all", s, backend=kind) for s in ("kfac", "ekfac"))
    kfac.fit(loader), ekfac.fit(loader)
    places, corrected = ekfac.H.tensors.place, 0
    for before, after in zip(kfac.H.pieces, ekfac.H.pieces, strict=True):
        index = places(after.part).gather(torch.arange(len(exact))).flatten()
        block = exact[index][:, index]
        if block.norm() < 1e-20:  # a bias without influence but rounding
            continue
        Q = after.basis.to_dense()
        torch.testing.assert_close(Q, before.basis.to_dense(), rtol=0, atol=0)
        spectra = kfac.H.spectrum(before).flatten(), ekfac.H.spectrum(after).flatten()
        close(spectra[1], (Q.T @ block @ Q).diagonal())
        product, exact_diagonal = ((Q @ torch.diag(s) @ Q.T - block).norm() for s in spectra)
        assert exact_diagonal <= product + 1e-12 * block.norm()
        corrected += bool(exact_diagonal < 0.999 * product)
    assert corrected


class Batches:
    """The batches of a problem as a loader."""

    def __init__(self, problem: Problem) -> None:
        self.batches = problem.data
        self.dataset = range(sum(len(y) for _, y in problem.data))

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_more_data_can_be_added_to_a_posterior() -> None:
    model, x, y = toy()
    for structure in ("full", "diag", "kron", "kfac"):
        once, twice = (Laplace(model, "classification", "all", structure, backend=GGNBackend) for _ in range(2))
        once.fit(loader_of(x, y))
        twice.fit(loader_of(x[:7], y[:7]))
        twice.fit(loader_of(x[7:], y[7:], batch_size=2), override=False)
        close(precision(twice), precision(once))
        close(twice.log_marginal_likelihood(), once.log_marginal_likelihood())


@pytest.mark.parametrize("subset,structure", [s for s in STRUCTURES if s[1] != "low_rank"])
def test_saved_posteriors_come_back(subset: str, structure: str, tmp_path: Any) -> None:
    la = fitted("regression", subset, structure, sigma_noise=0.8, prior_precision=1.5)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    model, x, y = toy("regression")
    loaded = Laplace(model, "regression", subset, structure, backend=GGNBackend)
    loaded.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=False))
    close(loaded(x)[1], la(x)[1])
    close(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    close(copy.deepcopy(la)(x)[1], la(x)[1])
    if subset == "all":  # the extractor of a last layer has a local function for a hook
        close(pickle.loads(pickle.dumps(la))(x)[1], la(x)[1])
    if structure == "kfac" and subset == "all":
        loaded.fit(loader_of(x, y), override=False)
        assert loaded.n_data == 24


def test_models_that_kron_refuses() -> None:
    """A scalar, a five-dimensional kernel, an embedding whose second factor would be as large as the vocabulary."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.table = nn.Parameter(torch.tensor(1.5)), nn.Embedding(30000, 2)
            self.conv, self.head = nn.Conv3d(1, 2, 2), nn.Linear(2, 3)

        def forward(self, ids: Tensor) -> Tensor:
            volume = self.table(ids).sum(-1).reshape(-1, 1, 2, 2, 2)
            return self.head(self.gain * self.conv(volume).flatten(1).tanh())

    torch.manual_seed(0)
    model, ids, y = Model(), torch.randint(0, 30000, (6, 8)), classes(6, of=3)
    with pytest.raises(ValueError, match="Invalid parameter shape"):
        Laplace(model, "classification", "all", "kron", backend=GGNBackend)
    for structure in ("kfac", "ekfac"):
        la = Laplace(model, "classification", "all", structure, backend=EFBackend)
        la.fit(loader_of(ids, y))
        assert len(la.H) == 6 and torch.isfinite(la.log_marginal_likelihood())
        assert la(ids, pred_type="nn", link_approx="mc", n_samples=2).shape == (6, 3)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "kfac", "ekfac"])
def test_mappings(structure: str) -> None:
    torch.manual_seed(0)
    model, x, y = FromMapping().double(), normal(7, 4), classes(7, of=3)
    keys = {"dict_key_x": "inputs", "dict_key_y": "labels"}
    plain = Laplace(model.net, "classification", "all", structure, backend=EFBackend)
    plain.fit(loader_of(2 * x, y))
    la = Laplace(model, "classification", "all", structure, backend=EFBackend, **keys)
    la.fit(mapping_loader(x, y))
    close(precision(la), precision(plain))
    batch = next(iter(mapping_loader(x, y, 7)))
    close(la(batch), plain(2 * x))


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("kind", [GGNBackend, EFBackend])
def test_subnetworks(kind: type, structure: str) -> None:
    model, x, y = toy()
    torch.set_default_dtype(F64)  # laplace-torch samples a subnetwork in the default dtype
    try:
        chosen = torch.tensor([1, 5, 21, 40])
        la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=chosen, backend=kind)
        la.fit(loader_of(x, y))
        exact = kind(model, "classification").full(x, y)[1][chosen][:, chosen]
        close(precision(la), (exact if structure == "full" else torch.diag(exact.diagonal())) + torch.eye(4))
        assert la(x).shape == la(x, pred_type="nn", link_approx="mc", n_samples=3).shape == (12, 3)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "kfac", "ekfac"])
def test_token_outputs(structure: str) -> None:
    """Fit and evidence, where a position is a term and some are ignored; predictions by sampled networks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    x, y = normal(6, 2, 4), classes(6, 2, of=5)
    y[0, 1] = y[4, 0] = -100
    la = Laplace(model, "classification", "all", structure, backend=GGNBackend)
    la.fit(loader_of(x, y))
    keep = y.flatten() >= 0
    plain = Laplace(model, "classification", "all", structure, backend=GGNBackend)
    plain.fit(loader_of(x.flatten(0, 1)[keep], y.flatten()[keep]))
    if structure in ("full", "diag"):  # those of an EKFAC treat the positions of an example together
        close(precision(la), precision(plain))
    close(la.loss, plain.loss)
    assert torch.isfinite(la.log_marginal_likelihood())
    assert la(x, pred_type="nn", link_approx="mc", n_samples=2).shape == (6, 2, 5)


def test_last_layer_with_many_outputs_needs_no_jacobians() -> None:
    """A thousand outputs: the Jacobian of eight inputs would be phi (x) I, a gigabyte."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1000))
    x, y = torch.randn(8, 4), classes(8, of=1000)
    for structure in ("kfac", "diag"):
        la = Laplace(model, "classification", "last_layer", structure, backend=GGNBackend)
        la.fit(loader_of(x, y))
        if structure == "kfac":
            la.backend.last_layer_jacobians = None  # type: ignore[method-assign, assignment]
            p = la(x)
            assert p.shape == (8, 1000) and torch.allclose(p.sum(-1), torch.ones(8), atol=1e-4)
            assert la.functional_variance_fast(x)[1].shape == (8, 1000)


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_predictions_may_keep_their_graph_to_the_inputs(structure: str) -> None:
    model, x, y = toy("regression")
    for subset in ("all", "last_layer"):
        la = Laplace(model, "regression", subset, structure, backend=GGNBackend, enable_backprop=True)
        la.fit(loader_of(x, y))

        def variances(x: Tensor, la: Any = la) -> Tensor:
            return la(x)[1].flatten(1).sum(-1)

        assert torch.autograd.gradcheck(variances, (x[:3].clone().requires_grad_(),))


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full"])
def test_training_by_the_evidence(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.linspace(-2, 2, 24, dtype=F64).unsqueeze(1)
    y = x.sin() + 0.1 * torch.randn(24, 1, dtype=F64)
    la, _, evidences, losses = marglik_training(
        model, loader_of(x, y, 12), "regression", structure, backend=GGNBackend, n_epochs=12, n_hypersteps=4, lr_hyp=0.1
    )
    assert evidences[-1] < evidences[0] and losses[-1] < losses[0]  # it reports negative evidences
    assert torch.isfinite(la.log_marginal_likelihood())


def test_function_space_posteriors_take_the_jacobians() -> None:
    model, x, y = toy()
    common = {"subsample_size": 6, "n_eigenvalues": 4}
    mine, theirs = (ELLA(model, "classification", backend=b, **common) for b in (GGNBackend, CurvlinopsGGN))
    for la in (mine, theirs):
        torch.manual_seed(0)
        la.fit(loader_of(x, y))
    close(mine(x), theirs(x))


def test_hessian_posterior() -> None:
    problem = summed("mlp_mse")
    x, y = problem.data[0]
    la = Laplace(problem.model, "regression", "all", "full", backend=HessianBackend, prior_precision=100.0)
    la.fit(loader_of(x, y, 2))
    values = dict(problem.model.named_parameters())
    flat = torch.cat([p.flatten() for p in values.values()]).detach()

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in values.values()])
        replaced = {n: v.reshape(values[n].shape) for n, v in zip(values, pieces, strict=True)}
        return (torch.func.functional_call(problem.model, replaced, x) - y).square().sum() / 2

    exact = torch.autograd.functional.hessian(loss, flat)
    close(precision(la), exact + 100 * torch.eye(len(flat), dtype=F64))


def test_misuse_is_refused() -> None:
    model, x, y = toy()
    for structure in ("kfac", "ekfac"):
        for backend in (CurvlinopsGGN, HessianBackend):
            with pytest.raises(ValueError, match="needs the factors of GGNBackend or EFBackend"):
                Laplace(model, "classification", "all", structure, backend=backend)
    la = Laplace(model, "classification", "all", "ekfac")
    with pytest.raises(ValueError, match="cannot be extended"):
        la.fit(loader_of(x, y), override=False)
    with pytest.raises(ValueError, match="one eigenvalue per parameter"):
        Laplace(model, "classification", "all", "ekfac", damping=True).fit(loader_of(x, y))
    with pytest.raises(NotImplementedError, match="no Kronecker factors"):
        Laplace(model, "classification", "all", "kron", backend=HessianBackend).fit(loader_of(x, y))
