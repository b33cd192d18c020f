"""Do the backends for laplace-torch give the matrices, Jacobians and gradients of the definition?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

pytest.importorskip("laplace")

from curvature.laplace import EFBackend, GGNBackend, HessianBackend
from tests.curvature import dense_reference as dense
from tests.curvature.laplace.problems import (
    ONE_TENSOR,
    FromMapping,
    backend_of,
    data_size,
    definition,
    frozen,
    last_layer,
    likelihood,
    mapping_of,
    summed,
    toy,
)
from tests.curvature.problems import F64, Problem, classes, normal

BOTH = [GGNBackend, EFBackend]


def close(got: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def over_batches(problem: Problem, method: Callable[..., tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Sums of the loss and of the curvature, as ``fit`` makes them."""
    parts = [method(x, y, N=data_size(problem)) for x, y in problem.data]
    loss, curvature = parts[0]
    for more_loss, more in parts[1:]:
        loss, curvature = loss + more_loss, curvature + more
    return loss, curvature


def true_loss(problem: Problem) -> Tensor:
    z, y = dense.dataset_outputs(problem, problem.model)
    return (0.5 if likelihood(problem) == "regression" else 1.0) * problem.loss_fn(z, y).detach()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", ONE_TENSOR)
def test_full_and_diagonal_are_those_of_the_definition(name: str, kind: type) -> None:
    problem = summed(name)
    backend, expected = backend_of(problem, kind), definition(problem, kind)
    loss, H = over_batches(problem, backend.full)
    close(H, expected)
    close(loss, true_loss(problem))
    loss, d = over_batches(problem, backend.diag)
    close(d, expected.diagonal())
    close(loss, true_loss(problem))


@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse", "cnn", "encoder_pre_norm", "language_model"])
def test_hessian_is_that_of_the_definition(name: str) -> None:
    problem = summed(name)
    values = {n: p.detach() for n, p in dense.trainable(problem.model).items()}
    where = torch.cat([p.flatten() for p in values.values()])

    def loss(flat: Tensor) -> Tensor:
        pieces = dict(zip(values, flat.split([p.numel() for p in values.values()]), strict=True))
        replaced = {n: piece.reshape(values[n].shape) for n, piece in pieces.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            pairs = [dense.as_terms(problem, functional_call(problem.model, replaced, x), y) for x, y in problem.data]
        return sum(problem.loss_fn(z, y) for z, y in pairs)  # type: ignore[return-value]

    # Not torch.func.hessian, which is wrong for layer norms.
    expected = torch.autograd.functional.hessian(loss, where) * (0.5 if likelihood(problem) == "regression" else 1.0)
    backend = backend_of(problem, HessianBackend)
    close(over_batches(problem, backend.full)[1], expected)
    close(over_batches(problem, backend.diag)[1], expected.diagonal())


@pytest.mark.parametrize("kind", [*BOTH, HessianBackend])
@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse"])
def test_low_rank_is_the_part_with_positive_eigenvalues(name: str, kind: type) -> None:
    problem = summed(name)
    size = sum(p.numel() for p in problem.model.parameters())
    backend = backend_of(problem, kind, low_rank=size)
    full = over_batches(problem, backend.full)[1]
    U, values, loss = backend.eig_lowrank(problem.data)
    eigenvalues, vectors = torch.linalg.eigh(full)
    keep = eigenvalues > 1e-6
    close(U @ torch.diag(values) @ U.T, vectors[:, keep] @ torch.diag(eigenvalues[keep]) @ vectors[:, keep].T)
    close(loss, true_loss(problem))
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    fewer = backend_of(problem, kind, low_rank=2).eig_lowrank(problem.data)
    close(fewer[1], values[:2])


@pytest.mark.parametrize("name", [n for n in ONE_TENSOR if n not in ("language_model", "linear_on_sequences")])
def test_jacobians_and_gradients_are_those_of_the_definition(name: str) -> None:
    problem = summed(name)
    x, y = problem.data[0]
    backend = backend_of(problem, EFBackend)
    z = problem.model(x)
    expected = dense.jacobian(z, list(dense.trainable(problem.model).values()))
    J, f = backend.jacobians(x)
    close(J, expected.flatten(1, -2))
    close(f, z.detach())
    assert not J.requires_grad and not f.requires_grad
    outputs = torch.randint(0, J.shape[1], (len(x), 2))
    chosen, _ = backend.selected_output_jacobians(x, outputs)
    close(chosen, torch.stack([J[n, row] for n, row in enumerate(outputs)]))
    close(backend.selected_output_jacobians(x, outputs[:, 0])[0], chosen[:, :1])
    g, loss = backend.gradients(x, y)
    for n in range(len(x)):
        one = problem.loss_fn(problem.model(x)[n : n + 1], y[n : n + 1]).reshape(1)
        close(g[n], dense.jacobian(one, list(dense.trainable(problem.model).values()))[0])
    close(loss, problem.loss_fn(z, y).detach())


@pytest.mark.parametrize("name", ["mlp_ce", "cnn", "encoder_pre_norm", "frozen_parts"])
def test_jacobians_may_keep_their_graph_to_the_inputs(name: str) -> None:
    problem = summed(name)
    x = problem.data[0][0].requires_grad_()
    backend = backend_of(problem, GGNBackend)
    J, f = backend.jacobians(x, enable_backprop=True)
    plain, z = backend.jacobians(x)
    close(J.detach(), plain)
    close(f.detach(), z)
    weights = torch.randn(J.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((weights * J).sum(), x)
    step = 1e-5 * torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    ahead, behind = (backend.jacobians(x.detach() + s * step)[0] for s in (1, -1))
    torch.testing.assert_close((slope * step).sum(), (weights * (ahead - behind)).sum() / 2, rtol=1e-4, atol=1e-12)
    outputs = torch.zeros(len(x), 1, dtype=torch.long)
    close(backend.selected_output_jacobians(x, outputs, enable_backprop=True)[0].detach(), plain[:, :1])


@pytest.mark.parametrize("kind", [*BOTH, HessianBackend])
@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse", "cnn"])
def test_a_subnetwork_is_a_part_of_the_whole(name: str, kind: type) -> None:
    problem = summed(name)
    x, y = problem.data[0]
    backend = backend_of(problem, kind)
    whole, J, g = backend.full(x, y)[1], backend.jacobians(x)[0], backend.gradients(x, y)[0]
    size = len(whole)
    # Out of order, and leaving some parameters out altogether.
    backend.subnetwork_indices = chosen = torch.tensor([size - 1, 3, 1, size - 2])
    close(backend.full(x, y)[1], whole[chosen][:, chosen])
    close(backend.diag(x, y)[1], whole.diagonal()[chosen])
    close(backend.jacobians(x)[0], J[..., chosen])
    close(backend.jacobians(x, enable_backprop=True)[0].detach(), J[..., chosen])
    close(backend.gradients(x, y)[0], g[:, chosen])
    with pytest.raises((ValueError, NotImplementedError), match="Kronecker factors"):
        backend.kron(x, y, N=len(x))


@pytest.mark.parametrize(
    "names", [("0.weight",), ("0.bias",), ("2.weight",), ("2.bias", "0.weight"), ("0.bias", "2.bias")]
)
@pytest.mark.parametrize("kind", BOTH)
def test_any_parameters_may_be_frozen(kind: type, names: tuple[str, ...]) -> None:
    whole = summed("mlp_ce")
    problem = frozen(whole, *names)
    backend, expected = backend_of(problem, kind), definition(problem, kind)
    close(over_batches(problem, backend.full)[1], expected)
    close(over_batches(problem, backend.diag)[1], expected.diagonal())
    where = dense.flat_indices(whole.model)
    kept = torch.cat([index.flatten() for name, index in where.items() if name not in names])
    complete = over_batches(whole, backend_of(whole, kind).kron)[1]
    part = over_batches(problem, backend.kron)[1]
    assert len(part) == 4 - len(names)
    close(part.to_matrix(), complete.to_matrix()[kept][:, kept])


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_last_layer_is_a_part_of_the_whole(task: str, kind: type) -> None:
    model, x, y = toy(task)
    whole = kind(model, task)
    backend = kind(last_layer(model, x), task, last_layer=True)
    P = sum(p.numel() for p in model[2].parameters())  # type: ignore[index]
    close(backend.full(x, y)[1], whole.full(x, y)[1][-P:, -P:])
    close(backend.diag(x, y)[1], whole.diag(x, y)[1][-P:])
    close(backend.kron(x, y, N=20)[1].to_matrix(), whole.kron(x, y, N=20)[1].to_matrix()[-P:, -P:])
    close(backend.last_layer_jacobians(x)[0], whole.jacobians(x)[0][..., -P:])
    close(backend.jacobians(x)[0], whole.jacobians(x)[0][..., -P:])
    close(backend.gradients(x, y)[0], whole.gradients(x, y)[0][:, -P:])
    for got in (backend.diag(x, y), backend.full(x, y), backend.kron(x, y, N=20)):
        close(got[0], whole.full(x, y)[0])


class Pooled(nn.Module):
    """A last layer on every position, and something after it: no function of its inputs alone."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        if tied:
            self.last.weight = nn.Parameter(self.first.weight[:, :3].detach().clone())
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        if self.tied:
            return self.last((self.last.weight @ self.first(x).mT).mT.tanh().mean(1))
        return self.last(self.first(x).tanh()).mean(1).tanh()


@pytest.mark.parametrize("tied", [False, True])
def test_last_layer_that_is_no_function_of_features_alone(tied: bool) -> None:
    """What comes after the last layer, and other uses of its weight, count."""
    torch.manual_seed(0)
    model, x, y = Pooled(tied).double(), normal(4, 2, 4), classes(4, of=3)
    whole = GGNBackend(model, "classification")
    backend = GGNBackend(last_layer(model, x), "classification", last_layer=True)
    P = sum(p.numel() for p in model.last.parameters())
    close(backend.full(x, y)[1], whole.full(x, y)[1][-P:, -P:])
    close(backend.diag(x, y)[1], whole.diag(x, y)[1][-P:])
    close(backend.kron(x, y, N=4)[1].to_matrix(), whole.kron(x, y, N=4)[1].to_matrix()[-P:, -P:])
    close(backend.last_layer_jacobians(x)[0], whole.jacobians(x)[0][..., -P:])
    close(backend.last_layer_jacobians(x, enable_backprop=True)[0].detach(), whole.jacobians(x)[0][..., -P:])


@pytest.mark.parametrize("kind", BOTH)
def test_token_outputs_with_ignored_positions(kind: type) -> None:
    """Each position that counts is a term; the last layer alone gives the same in closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    x, y = normal(3, 4, 4), classes(3, 4, of=5)
    y[0, 1:], y[2, 0] = -100, -100
    problem = Problem(model, nn.CrossEntropyLoss(reduction="sum"), [(x[:1], y[:1]), (x[1:], y[1:])], class_dim=-1)
    expected = definition(problem, kind)
    backend, head = kind(model, "classification"), kind(last_layer(model, x), "classification", last_layer=True)
    for one, where in ((backend, slice(None)), (head, slice(-20, None))):
        close(over_batches(problem, one.full)[1], expected[where, where])
        close(over_batches(problem, one.diag)[1], expected.diagonal()[where])
    both = over_batches(problem, backend.kron)[1].to_matrix(), over_batches(problem, head.kron)[1].to_matrix()
    close(both[1], both[0][-20:, -20:])
    assert backend.jacobians(x)[0].shape == (3, 20, 35)


@pytest.mark.parametrize("kind", BOTH)
def test_mappings_reach_the_model_as_they_are(kind: type) -> None:
    torch.manual_seed(0)
    model, x, y = FromMapping().double(), normal(5, 4), classes(5, of=3)
    batch, plain = mapping_of(x, y), kind(model.net, "classification")
    backend = kind(model, "classification", dict_key_x="inputs", dict_key_y="labels")
    close(backend.full(batch, y)[1], plain.full(2 * x, y)[1])
    close(backend.diag(batch, y)[1], plain.diag(2 * x, y)[1])
    close(backend.kron(batch, y, N=5)[1].to_matrix(), plain.kron(2 * x, y, N=5)[1].to_matrix())
    close(backend.jacobians(batch)[0], plain.jacobians(2 * x)[0])
    close(backend.jacobians(batch, enable_backprop=True)[0].detach(), plain.jacobians(2 * x)[0])
    close(backend.gradients(batch, y)[0], plain.gradients(2 * x, y)[0])
    close(backend.eig_lowrank([batch])[1], plain.eig_lowrank([(2 * x, y)])[1])


def test_pairs_of_inputs_for_reward_models() -> None:
    """Training sees pairs ``(M, 2, d)`` and two logits, prediction single inputs and one."""

    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.reshape(-1, 4)).reshape(len(x), -1)

    torch.manual_seed(0)
    model, x, y = Reward().double(), normal(5, 2, 4), classes(5, of=2)
    backend = GGNBackend(model, "classification")
    problem = Problem(model, nn.CrossEntropyLoss(reduction="sum"), [(x, y)])
    close(backend.full(x, y)[1], definition(problem, GGNBackend))
    close(backend.diag(x, y)[1], definition(problem, GGNBackend).diagonal())
    assert len(backend.kron(x, y, N=5)[1]) == 4
    assert backend.jacobians(x[:, 0])[0].shape == (5, 1, 19)


def test_stochastic_fisher_is_unbiased_and_repeatable() -> None:
    model, x, y = toy()
    exact = GGNBackend(model, "classification").full(x, y)[1]

    def draws(seed: int, **options: Any) -> Tensor:
        return GGNBackend(model, "classification", stochastic=True, seed=seed, **options).full(x, y)[1]

    state = torch.get_rng_state()
    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    errors = [float((draws(0, num_samples=n) - exact).norm() / exact.norm()) for n in (1, 30, 1000)]
    # The error of a mean of n draws falls as 1 / sqrt(n), here from about 1.
    assert errors[2] < 0.15 and errors[2] < errors[1] < errors[0]
    backend = GGNBackend(model, "classification", stochastic=True)
    first, second = backend.diag(x, y)[1], backend.diag(x, y)[1]
    assert not torch.equal(first, second)  # batches draw anew
    many = backend.diag(x, y, mc_samples=1000)[1]
    torch.testing.assert_close(many, exact.diagonal(), rtol=0.2, atol=0.1 * float(exact.diagonal().max()))
    assert torch.equal(torch.get_rng_state(), state)


def test_empirical_fisher_of_regression_is_doubled_as_elsewhere() -> None:
    model, x, y = toy("regression")
    g = EFBackend(model, "regression").gradients(x, y)[0] / 2  # of half the squared error
    close(EFBackend(model, "regression", unit_noise=True).full(x, y)[1], g.T @ g)
    close(EFBackend(model, "regression").full(x, y)[1], 2 * g.T @ g)
    close(EFBackend(model, "regression", unit_noise=True).diag(x, y)[1], (g.T @ g).diagonal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", BOTH)
def test_results_have_the_dtype_of_the_model(kind: type, dtype: torch.dtype) -> None:
    model, x, y = toy()
    model = model.to(torch.float64)
    exact = kind(copy.deepcopy(model), "classification").full(x, y)[1]
    low = kind(model.to(dtype), "classification")
    x = x.to(dtype)
    # The numbers of a forward and a backward pass carry a few roundings each.
    tolerance = {"rtol": 0.0, "atol": 30 * torch.finfo(dtype).eps * float(exact.abs().max())}
    loss, H = low.full(x, y)
    assert loss.dtype == H.dtype == dtype
    torch.testing.assert_close(H.double(), exact, **tolerance)
    loss, d = low.diag(x, y)
    assert loss.dtype == d.dtype == dtype
    torch.testing.assert_close(d.double(), exact.diagonal(), **tolerance)
    loss, kron = low.kron(x, y, N=len(x))
    assert loss.dtype == kron.diag().dtype == kron.to_matrix().dtype == dtype
    posterior = kron.decompose() + torch.ones(1, dtype=dtype)
    vectors = torch.randn(2, 3, len(H), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert posterior.inv_square_form(vectors).dtype == posterior.diag().dtype == dtype
    assert low.jacobians(x)[0].dtype == low.gradients(x, y)[0].dtype == dtype


@pytest.mark.parametrize("kind", [*BOTH, HessianBackend])
def test_nothing_of_the_model_changes(kind: type) -> None:
    problem = summed("residual_eval")
    model = problem.model.train()
    if kind is HessianBackend:  # costs two backward passes per parameter
        model.requires_grad_(False).get_submodule("bn1").requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, keys, state = copy.deepcopy(model.state_dict()), set(vars(model)), torch.get_rng_state()
    backend = backend_of(problem, kind, low_rank=1)
    x, y = problem.data[0]
    for call in (backend.full, backend.diag, *([backend.kron] if kind is not HessianBackend else [])):
        call(x, y, N=len(x))
    backend.jacobians(x), backend.jacobians(x, enable_backprop=True), backend.gradients(x, y)
    backend.eig_lowrank([(x, y)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert set(vars(model)) == keys and torch.equal(torch.get_rng_state(), state) and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    copies = pickle.loads(pickle.dumps(backend)), copy.deepcopy(backend)
    for other in copies:
        close(other.full(x, y)[1], backend.full(x, y)[1])


def test_last_layer_leaves_the_features_of_the_extractor() -> None:
    model, x, y = toy()
    extractor = last_layer(model, x)
    kept = dict(extractor._features)
    backend = GGNBackend(extractor, "classification", last_layer=True)
    backend.diag(x[:5], y[:5]), backend.last_layer_jacobians(x[:5]), backend.full(x[:5], y[:5])
    assert all(extractor._features[name] is value for name, value in kept.items())
    hooks = [hook for m in extractor.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert len(hooks) == 1  # its own


def test_misuse_is_refused() -> None:
    model, x, y = toy()
    backend = GGNBackend(model, "classification")
    with pytest.raises(TypeError, match=r"does not know .'mc_sample'."):
        backend.full(x, y, mc_sample=3)
    with pytest.raises(ValueError, match="mc_samples must be at least 1, got 0"):
        backend.diag(x, y, mc_samples=0)
    with pytest.raises(ValueError, match="'expand' or 'reduce', got 'shrink'"):
        backend.kron(x, y, N=12, kfac_approx="shrink")
    with pytest.raises(ValueError, match="num_samples is at least 1"):
        GGNBackend(model, "classification", num_samples=0)
    with pytest.raises(ValueError, match="max_dense is at least 1"):
        EFBackend(model, "classification", max_dense=0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        GGNBackend(copy.deepcopy(model).requires_grad_(False), "classification").diag(x, y)
    with pytest.raises(ValueError, match="3 rows for a batch of 12"):
        backend.selected_output_jacobians(x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="detached"):
        detached = nn.Sequential(model, Detach())
        GGNBackend(detached, "classification").diag(x, y)
    with pytest.raises(ValueError, match="no batches"):
        backend.eig_lowrank([])


class Detach(nn.Module):
    """Cuts its input off the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()
