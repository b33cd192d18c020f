"""Layers that only some batches reach, and losses that only some layers reach: nothing may be divided by too little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from tests.curvature.loops import assert_same, fisher, silently, statistics, watching

LOSS = nn.CrossEntropyLoss()
STRUCTURES = ["layer", "diagonal", "kfac", "ekfac", "tnt", "unit"]


class Conditional(nn.Module):
    """The second branch is used where the first input of the batch is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return z + self.scale * self.second(x) if x[0, 0] > 0 else z


def conditional() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 4, dtype=torch.float64, generator=g)
    x[:, 0, 0] = torch.tensor([1.0, -1.0, -1.0])
    y = torch.randint(0, 3, (3, 4), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Conditional().double(), list(zip(x, y, strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("params", [None, ["second.*"]])
def test_batches_that_miss_a_layer_count(structure: Any, params: Any) -> None:
    model, data = conditional()
    missed = fisher(model, LOSS, data, kind="exact", structure=structure, params=params)
    used = fisher(model, LOSS, data[:1], kind="exact", structure=structure, params=params)
    name = "second.weight+second.bias"
    torch.testing.assert_close(missed[name], used[name] / 3, rtol=1e-10, atol=1e-14)
    if structure == "layer":
        full, layer = (curvature.ggn(model, LOSS, data, params=params, structure=s) for s in ("full", "layer"))
        torch.testing.assert_close(layer.to_dense()[-15:, -15:], full.to_dense()[-15:, -15:], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_accumulated_batches_that_miss_a_layer_count(structure: str) -> None:
    model, data = conditional()
    optimizer = watching(model, LOSS, structure)
    for x, y in data:
        (LOSS(model(x), y) / len(data)).backward()
    silently(optimizer.step)
    expected = fisher(model, LOSS, data, kind="exact", structure=structure)
    assert_same(statistics(optimizer), expected)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.a(h), self.b(h)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_each_of_two_losses_has_its_own_divisor(structure: str, kind: str) -> None:
    """The first loss has six terms and the second two: a layer that only the second reaches is divided by two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Heads().double(), torch.randn(6, 4, dtype=torch.float64)
        y = torch.randint(0, 3, (6,))
    masked = y.clone()
    masked[2:] = -100
    optimizer = watching(model, LOSS, structure, kind)
    a, b = model(x)
    (LOSS(a, y) + LOSS(b, masked)).backward()
    silently(optimizer.step)
    found = statistics(optimizer)
    options: Any = {"kind": kind, "structure": structure}
    one = fisher(model, LOSS, (x, y), output=lambda z: z[0], **options)
    other = fisher(model, LOSS, (x, masked), output=lambda z: z[1], **options)
    assert_same({"a": found["a.weight+a.bias"]}, {"a": one["a.weight+a.bias"]})
    assert_same({"b": found["b.weight+b.bias"]}, {"b": other["b.weight+b.bias"]})
    trunk = "trunk.weight+trunk.bias"
    if structure == "diagonal":
        assert_same({"trunk": found[trunk]}, {"trunk": one[trunk] + other[trunk]})
