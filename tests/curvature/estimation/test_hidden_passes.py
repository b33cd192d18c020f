"""Passes that hide layers behind a reentrant checkpoint, beside passes in the open, in steps and within a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.curvature.loops import assert_same, batch, silently, statistics, watching

LOSS = nn.CrossEntropyLoss()


class Checkpointed(nn.Module):
    """Hides its first or its second layer while told to; dropout draws from the user's random stream."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.hides, self.on, self.drop = hides, False, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            layer = getattr(self, name)
            if self.on and self.hides == name:
                x = x if x.requires_grad else x.clone().requires_grad_()
                x = checkpoint(lambda z, layer=layer: self.drop(layer(z).tanh()), x, use_reentrant=True)
            else:
                x = self.drop(layer(x).tanh())
        return self.last(x)


#: For every step, whether each of its batches is hidden.
PLANS = [
    [[True], [True], [True]],
    [[False], [True], [False], [True]],
    [[False, False], [False, True], [True, False]],
    [[False], [False, True, False]],
    [[False, True]],
]


def run(hides: str, plan: list[list[bool]], kind: str, together: bool) -> list[dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Checkpointed(hides).double()
        optimizer = watching(model, LOSS, "kfac", kind, curvature_ema=0.0)
        found = []
        for step in plan:
            optimizer.zero_grad()
            losses = []
            for number, hidden in enumerate(step):
                model.on = hidden
                x, y = batch(6, seed=number + 1)
                losses.append(LOSS(model(x), y) / len(step))
                if not together:
                    losses.pop().backward()
            if together:
                torch.stack(losses).sum().backward()
            silently(optimizer.step)
            found.append(statistics(optimizer))
        return found


@pytest.mark.parametrize("together", [False, True], ids=["a backward pass each", "one backward pass"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("hides", ["first", "second"])
def test_hidden_passes_count_like_those_in_the_open(
    hides: str, plan: list[list[bool]], kind: str, together: bool
) -> None:
    for got, expected in zip(run(hides, plan, kind, together), run("nothing", plan, kind, together), strict=True):
        assert_same(got, expected)
