"""Gradients of some parameters that were divided by hand are told, and clipping is not; of all, they count so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from precond import PreconditionedOptimizer
from tests.curvature.loops import assert_same, batch, mlp, statistics, watching

CE = nn.CrossEntropyLoss()
X, Y = batch(6)
Edit = Callable[[nn.Module], Any]


def step(edit: Edit, times: int = 1, weight: float = 1.0) -> dict[str, Tensor]:
    model = mlp()
    optimizer: PreconditionedOptimizer = watching(model, CE, curvature_ema=0.0)
    for _ in range(times):
        (weight * CE(model(X), Y)).backward()
    edit(model)
    optimizer.step()
    return statistics(optimizer)


def divided(part: int, by: float) -> Edit:
    return lambda model: [p.grad.div_(by) for p in model[part].parameters()]


PARTS: dict[str, Edit] = {
    "a layer": divided(2, 8),
    "through data": lambda model: [p.grad.data.div_(4) for p in model[0].parameters()],
    "replaced": lambda model: [setattr(p, "grad", p.grad / 8) for p in model[0].parameters()],
    "one parameter": lambda model: model[0].weight.grad.div_(3),
    "by two numbers": lambda model: (divided(0, 2)(model), divided(2, 4)(model)),
}
CLIPPED: dict[str, Edit] = {
    "a layer": lambda model: nn.utils.clip_grad_norm_(model[0].parameters(), 0.01),
    "each": lambda model: [nn.utils.clip_grad_norm_([p], 0.01) for p in model.parameters()],
    "values": lambda model: nn.utils.clip_grad_value_(model[0].parameters(), 1e-3),
    "by the size of weights": lambda model: [
        p.grad.mul_(0.01 * p.data.norm() / p.grad.norm()) for p in model[2].parameters()
    ],
}


@pytest.mark.parametrize("how", PARTS)
def test_gradients_divided_in_parts_are_told(how: str) -> None:
    with pytest.warns(UserWarning, match="gradients of some parameters were divided by hand"):
        found = step(PARTS[how])
    assert_same(found, step(lambda model: None))


@pytest.mark.parametrize("how", CLIPPED)
def test_gradients_clipped_in_parts_are_those_of_the_loss(how: str) -> None:
    assert_same(step(CLIPPED[how]), step(lambda model: None))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_all_divided_is_the_loss_divided(times: int) -> None:
    def all_by(number: float) -> Edit:
        return lambda model: [divided(part, number)(model) for part in (0, 2)]

    assert_same(step(all_by(times), times), step(lambda model: None))
    assert_same(step(all_by(8), times), step(lambda model: None, times, 1 / 8))
