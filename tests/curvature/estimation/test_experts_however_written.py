"""Experts that see all examples and count for some have the factors of those that are given some alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.loops import assert_same, batch, statistics, watching

CE = nn.CrossEntropyLoss()
X, Y = batch(7)
ROUTE = torch.tensor([0, 1, 0, 2, 1, 0, 0])


def indexed(x: Tensor, experts: nn.ModuleList) -> Tensor:
    out = x.new_zeros(len(x), 3)
    for k, expert in enumerate(experts):
        out[ROUTE == k] = expert(x[ROUTE == k])
    return out


def chosen(x: Tensor, experts: nn.ModuleList) -> Tensor:
    out = experts[0](x)
    for k in (1, 2):
        out = torch.where((ROUTE == k)[:, None], experts[k](x), out)
    return out


SPELLINGS: dict[str, Callable[[Tensor, nn.ModuleList], Tensor]] = {
    "weights": lambda x, experts: sum((ROUTE == k)[:, None] * e(x) for k, e in enumerate(experts)),  # type: ignore[return-value]
    "filled": lambda x, experts: torch.stack(
        [e(x).masked_fill((ROUTE != k)[:, None], 0.0) for k, e in enumerate(experts)]
    ).sum(0),
    "chosen": chosen,
    "gathered": lambda x, experts: torch.stack([e(x) for e in experts])[ROUTE, torch.arange(7)],
    "einsum": lambda x, experts: torch.einsum(
        "nko,nk->no", torch.stack([e(x) for e in experts], 1), F.one_hot(ROUTE, 3).double()
    ),
    "one by one": lambda x, experts: torch.stack([experts[int(k)](a) for a, k in zip(x, ROUTE, strict=True)]),
}


class Experts(nn.Module):
    def __init__(self, how: Callable[[Tensor, nn.ModuleList], Tensor]) -> None:
        super().__init__()
        self.experts, self.how = nn.ModuleList(nn.Linear(4, 3) for _ in range(3)), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.experts)


def factors(how: Callable[[Tensor, nn.ModuleList], Tensor], kind: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Experts(how).double()
    optimizer = watching(model, CE, "kfac", kind, curvature_ema=0.0)
    CE(model(X), Y).backward()
    optimizer.step()
    return statistics(optimizer)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("how", SPELLINGS)
def test_experts_learn_from_their_own_examples(how: str, kind: str) -> None:
    assert_same(factors(SPELLINGS[how], kind), factors(indexed, kind))
