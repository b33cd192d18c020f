"""Does a resumed run continue bit for bit, whatever the moment and the way it was saved?"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from precond import EKFAC, KFAC, DiagonalFisher, Eigh, PreconditionedOptimizer, Tikhonov
from tests.curvature.loops import assert_same, mlp, statistics

Make = Callable[[nn.Module, nn.Module], PreconditionedOptimizer]


def kfac(model: nn.Module, loss_fn: nn.Module) -> PreconditionedOptimizer:
    return KFAC(model, loss_fn, lr=0.05, curvature_update_period=2, inverse_update_period=4, weight_decay=0.01)


def ekfac(model: nn.Module, loss_fn: nn.Module) -> PreconditionedOptimizer:
    return EKFAC(model, loss_fn, lr=0.05, curvature_update_period=2, inverse_update_period=4, momentum=0.0)


def diagonal(model: nn.Module, loss_fn: nn.Module) -> PreconditionedOptimizer:
    return PreconditionedOptimizer(
        model, loss_fn, curvature=DiagonalFisher(), damping=Tikhonov(1e-2), solver=Eigh(), lr=torch.tensor(0.05)
    )


def dense_model() -> tuple[nn.Module, Tensor]:
    return mlp().float(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def attention_model() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        model = nn.Sequential(
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(12, 3)
        )
    return model, torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1))


def half_model() -> tuple[nn.Module, Tensor]:
    model, x = dense_model()
    return model.bfloat16(), x.bfloat16()


Y = torch.arange(8) % 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    loss_fn = optimizer.loss_fn  # type: ignore[attr-defined]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), Y).backward()
        optimizer.step()


def saved(tree: Any) -> Any:
    """Through a file that may hold nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


MOMENTS = [(dense_model, steps) for steps in (0, 1, 4, 5, 6, 7)]  # before, at and between refreshes


@pytest.mark.parametrize(("build", "steps"), [*MOMENTS, (attention_model, 5), (half_model, 5)])
@pytest.mark.parametrize("make", [kfac, ekfac, diagonal])
def test_a_resumed_run_is_the_uninterrupted_one(build: Any, make: Make, steps: int) -> None:
    model, x = build()
    optimizer = make(model, nn.CrossEntropyLoss())
    train(model, optimizer, x, steps)
    checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, x, 6)

    other, _ = build()
    other.load_state_dict(checkpoint["model"])
    resumed = make(other, nn.CrossEntropyLoss())
    train(other, resumed, x, 1)  # loading replaces whatever there was
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(other, resumed, x, 6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.steps == optimizer.steps == steps + 6
    assert_same(statistics(resumed), statistics(optimizer), 1e-12)


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_half_precision_models_keep_factors_in_float32(make: Make) -> None:
    model, x = half_model()
    optimizer = make(model, nn.CrossEntropyLoss())
    train(model, optimizer, x, 3)
    checkpoint = saved(optimizer.state_dict())
    other, _ = half_model()
    resumed = make(other, nn.CrossEntropyLoss())
    resumed.load_state_dict(checkpoint)
    for name, preconditioner in resumed.preconditioners.items():
        before = list(tensors(optimizer.preconditioners[name].state_dict()))
        after = list(tensors(preconditioner.state_dict()))
        assert {t.dtype for t in after} == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_loading_copies() -> None:
    """Factors and inverses of the optimizer that was saved and of the one that was loaded share no memory."""
    model, x = dense_model()
    optimizer = kfac(model, nn.CrossEntropyLoss())
    train(model, optimizer, x, 3)
    state = optimizer.state_dict()
    blocks = [entry["blocks"] for entry in state["state"].values() if "blocks" in entry]
    before = [t.clone() for t in tensors(blocks)]
    other, _ = dense_model()
    resumed = kfac(other, nn.CrossEntropyLoss())
    resumed.load_state_dict(state)
    train(other, resumed, x, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(blocks), strict=True))


def test_options_are_restored_with_the_state() -> None:
    model, x = dense_model()
    optimizer = kfac(model, nn.CrossEntropyLoss())
    optimizer.param_groups[0].update(lr=0.5, damping=0.25)
    train(model, optimizer, x, 1)
    state = saved(optimizer.state_dict())
    resumed = kfac(dense_model()[0], nn.CrossEntropyLoss())
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.5 and resumed.param_groups[0]["damping"] == 0.25


# torch.distributed.checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_distributed_checkpoint_takes_and_sets_the_state(make: Make) -> None:
    """On a fresh optimizer it calls step() with zero gradients and lr = 0: nothing may come of that."""
    model, x = dense_model()
    optimizer = make(model, nn.CrossEntropyLoss())
    train(model, optimizer, x, 5)
    optimizer.zero_grad()
    # Without momentum torch finds no state and takes such a step on a trained optimizer, too.
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    assert optimizer.steps == 5
    train(model, optimizer, x, 5)

    other, _ = dense_model()
    resumed = make(other, nn.CrossEntropyLoss())
    untouched = [p.clone() for p in other.parameters()]
    get_optimizer_state_dict(other, resumed)
    assert resumed.steps == 0 and not resumed.preconditioners
    assert all(torch.equal(p, q) for p, q in zip(untouched, other.parameters(), strict=True))
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, state)
    assert resumed.steps == 5
    train(other, resumed, x, 5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_only_creates_state_leaves_the_next_steps_alone() -> None:
    runs = []
    for checkpointed in (False, True):
        model, x = dense_model()
        optimizer = ekfac(model, nn.CrossEntropyLoss())
        for _ in range(5):
            if checkpointed:
                optimizer.zero_grad()
                get_optimizer_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))
            train(model, optimizer, x, 1)
        runs.append(list(model.parameters()))
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)
