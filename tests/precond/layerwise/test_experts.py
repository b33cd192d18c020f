"""Does an expert that nothing counts in leave the curvature of all others as it is, and its own?"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from precond import methods

LAYERED = {method.name: method.cls for method in methods() if method.needs == "layers"}


class Experts(nn.Module):
    """Three experts, chosen by the first input; those in ``left_out`` are not called."""

    def __init__(self, left_out: Set[int] = frozenset()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.left_out = left_out
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        chosen, out = (x[:, 0] > 0).long() + (x[:, 0] > 1e9).long(), torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            if i not in self.left_out:
                rows = (chosen == i).nonzero()[:, 0]
                out = out.index_add(0, rows, expert(h[rows]))
        return self.last(out.tanh())


def data(masked: bool = False) -> tuple[Tensor, Tensor]:
    """No row chooses the last expert; ``masked`` leaves out those of the second."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(16) % 3
    return x, torch.where(x[:, 0] > 0, -100, y) if masked else y


def trained(cls: Any, left_out: Set[int], batches: list[tuple[Tensor, Tensor]]) -> Any:
    model, loss_fn = Experts(left_out), nn.CrossEntropyLoss()
    optimizer = cls(model, loss_fn, lr=0.02)
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", LAYERED)
def test_one_without_rows_is_one_that_is_not_called(name: str) -> None:
    called, _ = trained(LAYERED[name], set(), [data()] * 3)
    skipped, _ = trained(LAYERED[name], {2}, [data()] * 3)
    for ours, theirs in zip(called.parameters(), skipped.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)  # products of other shapes
    assert not any(map(torch.equal, called.first.parameters(), Experts().first.parameters()))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tnt", "layer", "diagonal"])
@pytest.mark.parametrize(("masked", "left_out"), [(False, {2}), (True, {1, 2})])
def test_on_data_they_count_zero(structure: str, masked: bool, left_out: set[int]) -> None:
    C, expected = (
        curvature.ggn(Experts(out), nn.CrossEntropyLoss(), data(masked), structure=structure).to_dense()
        for out in (set[int](), left_out)
    )
    torch.testing.assert_close(C, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_one_with_masked_rows_alone_starts_when_others_come(fisher: str) -> None:
    def kfac(model: nn.Module, loss_fn: nn.Module, lr: float) -> Any:
        return LAYERED["KFAC"](model, loss_fn, lr=lr, fisher=fisher)

    _, optimizer = trained(kfac, set(), [data(masked=True)])
    A = {name: p.estimator.operator().factors[1].to_dense() for name, p in optimizer.preconditioners.items()}
    assert not A.pop("experts.1.weight+experts.1.bias").any()
    assert all(a.isfinite().all() and a.any() for a in A.values())


def test_a_mean_of_masked_data_has_no_weight() -> None:
    mean, zero = curvature.structures.weighted_mean.WeightedMean(), torch.zeros(())
    for total, count in ((0.0, zero), (6.0, torch.tensor(2.0)), (0.0, zero), (5.0, 1.0)):
        mean.add(torch.tensor([total]), count)
        assert mean.finite()
        mean.commit(0.5)
    assert mean.weight == 1.5 and mean.value == (0.5 * 3 + 5) / 1.5
    mean.add(torch.tensor([1.0]), zero)
    assert not mean.finite()
