"""A sum of losses over parts of one output has the curvature of one call on all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.loops import assert_same, batch, statistics, watching

SUM = nn.CrossEntropyLoss(reduction="sum")
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two layers, which take what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Any, y: Tensor | None = None) -> Any:
        if isinstance(x, list):
            return [self(item) for item in x]
        z = self.last(self.inner(x).tanh())
        if y is None:
            return z
        parts = zip(z.split(4), y.split(4), strict=True)
        return {"loss": torch.stack([F.cross_entropy(a, b, reduction="sum") for a, b in parts]).sum(), "logits": z}


def cut(z: Tensor, y: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([SUM(a, b) for a, b in zip(z.split(sizes), y.split(sizes), strict=True)]).sum() / 6


def of_a_list(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Items of different sizes, as a model of images returns them."""
    return sum(SUM(a, b) for a, b in zip(model(list(x.split([1, 3, 2]))), y.split([1, 3, 2]), strict=True)) / 6


def steps_of_time(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x.view(2, 3, 4))
    return sum(SUM(z[:, t], y.view(2, 3)[:, t]) for t in range(3)) / 6


def backward_one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x)
    for part in (slice(0, 1), slice(1, 4)):
        (SUM(z[part], y[part]) / 6).backward(retain_graph=True)
    return SUM(z[4:], y[4:]) / 6


PARTS: dict[str, Step] = {
    "two": lambda model, x, y: cut(model(x), y, [3, 3]),
    "unequal": lambda model, x, y: cut(model(x), y, [1, 3, 2]),
    "an empty one": lambda model, x, y: cut(model(x), y, [2, 0, 4]),
    "behind a temperature": lambda model, x, y: cut(model(x) / 1.0, y, [2, 4]),
    "inside the model": lambda model, x, y: model(x, y)["loss"] / 6,
    "of a list": of_a_list,
    "steps of time": steps_of_time,
    "one by one": backward_one_by_one,
}


def trained_on(loss_fn: nn.Module, model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    optimizer = watching(model, loss_fn, "kfac", "exact", curvature_ema=0.0)
    loss().backward()
    optimizer.step()
    optimizer.detach()
    return statistics(optimizer)


@pytest.mark.parametrize("parts", PARTS)
def test_parts_are_one_output(parts: str) -> None:
    x, y = batch(6)
    found = []
    for step in (lambda model, x, y: SUM(model(x), y) / 6, PARTS[parts]):
        torch.manual_seed(0)
        model = Net().double()
        found.append(trained_on(SUM, model, lambda step=step, model=model: step(model, x, y)))
    assert_same(found[1], found[0], rtol=1e-10)


@pytest.mark.parametrize("heads", ["own layers", "columns"])
def test_heads_are_outputs_of_the_same_examples(heads: str) -> None:
    """The sum over both is that of two losses for each of 6 examples, whose mean has the sum of their curvatures."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 5)
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)
            self.both = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.inner(x).tanh()
            return (self.a(h), self.b(h)) if heads == "own layers" else self.both(h).split(3, -1)

    x, y = batch(6)
    found = []
    for loss_fn in (nn.CrossEntropyLoss(), SUM):
        torch.manual_seed(0)
        model = Two().double()

        def loss(model: nn.Module = model, loss_fn: nn.Module = loss_fn) -> Tensor:
            a, b = model(x)
            return loss_fn(a, y) + loss_fn(b, y.flip(0))

        optimizer = watching(model, loss_fn, "kfac", "exact", curvature_ema=0.0, output=lambda result: result[0])
        loss().backward()
        optimizer.step()
        optimizer.detach()
        found.append(statistics(optimizer))
    assert_same(found[1], found[0], rtol=1e-10)
