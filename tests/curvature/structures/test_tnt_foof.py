"""Kronecker products other than K-FAC's: of the gradients themselves (TNT), and of the inputs alone (FOOF)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import InputKronecker, TensorNormal
from precond import Cholesky, Eigh, FactoredTikhonov, PreconditionedOptimizer, Tikhonov
from solvers import Diagonal, Kronecker
from tests.curvature import dense_reference as reference
from tests.curvature.loops import batch, fisher, mlp, statistics
from tests.curvature.problems import PROBLEMS
from tests.curvature.structures.test_parts_of_the_matrix import assert_close, make, parts


def partial_traces(C: Tensor, index: Tensor) -> Tensor:
    """The tensor-normal block of every group, from the dense matrix; ``index (*stack, o, i)``."""
    groups = []
    for rows in index.reshape(-1, *index.shape[-2:]):
        o, i = rows.shape
        block = C[rows.flatten()][:, rows.flatten()].reshape(o, i, o, i)
        L, R = torch.einsum("oipi->op", block), torch.einsum("oioj->ij", block)
        trace = L.trace()
        groups.append(torch.kron(L, R) / (trace if trace > 0 else 1))
    return torch.block_diag(*groups)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_tnt_has_the_partial_traces_of_the_dense_block(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    C = reference.curvature(problem, kind)
    tnt = make(problem, kind, "tnt")
    kronecker = 0
    for block, index in zip(tnt.blocks, parts(tnt), strict=True):
        if isinstance(block, Kronecker):
            kronecker += 1
            assert_close(block.to_dense(), partial_traces(C, index))
            assert_close(block.trace(), C.diagonal()[index].sum())
        else:
            assert_close(block.diagonal(), C.diagonal()[index])
    if any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in problem.model.modules()):
        assert kronecker


def test_sampled_tnt_sees_the_draws_of_the_dense_blocks() -> None:
    problem = PROBLEMS["linear_on_sequences"]()
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    tnt = make(problem, "mc", "tnt", generator=draws[0], samples=2)
    layer = make(problem, "mc", "layer", generator=draws[1], samples=2)
    C = layer.to_dense()
    for block, index in zip(tnt.blocks, parts(tnt), strict=True):
        assert_close(block.to_dense(), partial_traces(C, index))


def test_tnt_keeps_large_factors_as_diagonals() -> None:
    problem = PROBLEMS["mlp_ce"]()
    full, cut = make(problem, "exact", "tnt"), make(problem, "exact", "tnt", max_dim=4)
    for whole, block in zip(full.blocks, cut.blocks, strict=True):
        for dense, factor in zip(whole.factors, block.factors, strict=True):
            if dense.in_shape[-1] > 4:
                assert isinstance(factor, Diagonal)
            assert_close(factor.diagonal(), dense.diagonal())


@pytest.mark.parametrize(
    ("name", "sharing"),
    [
        *((name, "expand") for name in ("mlp_ce", "mlp_ce_all_options", "linear_on_sequences", "cnn")),
        *((name, "reduce") for name in ("mlp_ce", "linear_on_images", "cnn")),
    ],
)
def test_foof_is_the_identity_times_the_input_factor(name: str, sharing: str) -> None:
    problem = PROBLEMS[name]()
    operator = make(problem, "empirical", "foof", sharing=sharing)
    dense = operator.to_dense()
    for layer, (B, A) in reference.kfac(problem, "empirical", sharing=sharing).items():
        index, expected = reference.kfac_block(problem.model, layer, torch.eye(B.shape[-1]).double().expand_as(B), A)
        assert_close(dense[index][:, index], expected)


def test_foof_of_other_blocks_is_the_identity_and_a_sum_counts_its_terms() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    x, y = batch(6)
    mean = curvature.fisher(model, nn.CrossEntropyLoss(), (x, y), kind="mc", structure="foof").to_dense()
    assert torch.equal(mean[-6:, -6:], torch.eye(6).double())
    summed = curvature.fisher(
        model, nn.CrossEntropyLoss(reduction="sum"), (x, y), kind="empirical", structure="foof"
    ).to_dense()
    assert_close(summed, 6 * mean)


def test_foof_counts_inputs_once_whatever_is_drawn() -> None:
    problem = PROBLEMS["mlp_ce"]()
    expected = make(problem, "empirical", "foof").to_dense()
    for kind, samples in (("mc", 1), ("mc", 3), ("exact", 1)):
        assert_close(make(problem, kind, "foof", samples=samples).to_dense(), expected)


STRUCTURES: dict[str, Any] = {"tnt": TensorNormal, "foof": InputKronecker}


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_training_sees_what_the_data_set_gives(structure: str, kind: Any) -> None:
    model, loss_fn, (x, y) = mlp(), nn.CrossEntropyLoss(), batch(6)
    optimizer = PreconditionedOptimizer(
        model, loss_fn, curvature=STRUCTURES[structure](kind), damping=Tikhonov(0.1), solver=Eigh(), lr=0.0
    )
    loss_fn(model(x), y).backward()
    optimizer.step()
    expected = fisher(model, loss_fn, (x, y), kind=kind, structure=structure)
    for name, block in statistics(optimizer).items():
        assert_close(block, expected[name])


def test_a_step_with_foof_is_a_ridge_regression_on_the_inputs() -> None:
    model, loss_fn, (x, y) = nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), batch(6)
    optimizer = PreconditionedOptimizer(
        model, loss_fn, curvature=InputKronecker("empirical"), damping=Tikhonov(0.1), solver=Eigh(), lr=1.0
    )
    before = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    loss_fn(model(x), y).backward()
    assert model.weight.grad is not None and model.bias.grad is not None
    gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    optimizer.step()
    a = torch.cat([x, torch.ones(6, 1).double()], 1)
    step = torch.linalg.solve(a.T @ a / 6 + 0.1 * torch.eye(5).double(), gradient.T).T
    assert_close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), before - step)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_both_train_through_a_checkpoint(structure: str) -> None:
    """Eight steps are four, a checkpoint, and four; the loss goes down."""
    loss_fn, (x, y) = nn.CrossEntropyLoss(), batch(12)

    def start() -> tuple[nn.Module, PreconditionedOptimizer]:
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
        model.load_state_dict(seed)
        chosen = STRUCTURES[structure]("mc")
        damping = FactoredTikhonov(1e-2)
        return model, PreconditionedOptimizer(
            model, loss_fn, curvature=chosen, damping=damping, solver=Cholesky(), lr=0.1
        )

    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return float(loss_fn(model(x), y))

    def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        return value(model)

    seed = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double().state_dict()
    seed = {name: tensor.clone() for name, tensor in seed.items()}
    model, optimizer = start()
    first = value(model)
    straight = train(model, optimizer, 8)
    model, optimizer = start()
    train(model, optimizer, 4)
    saved, weights = optimizer.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, optimizer = start()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert train(model, optimizer, 4) == straight < first
