"""A model that returns its loss, and nothing else that a loss could be called on, has the curvature of that loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.loops import assert_same, batch, mlp, statistics, watching

CE, EACH = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")

#: What a model makes of its logits.
RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a function": lambda z, y: F.cross_entropy(z, y),
    "a module": lambda z, y: CE(z, y),
    "in a list": lambda z, y: [CE(z, y)],
    "as one row": lambda z, y: CE(z, y).unsqueeze(0),
    "with a scale": lambda z, y: 2 * CE(z, y) / 2,
    "with a penalty": lambda z, y: CE(z, y) + 0.0 * z.square().mean(),
    "of each example": lambda z, y: EACH(z, y),
    "beside what has no gradient": lambda z, y: [CE(z, y), (z.argmax(-1) == y).double().mean()],
}


class Returning(nn.Module):
    def __init__(self, returns: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.returns = mlp(), returns

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.returns(self.net(x), y)


def minimised(result: Any) -> Tensor:
    return (result[0] if isinstance(result, list) else result).mean()


#: Of a hidden pass, one number alone is known to be a loss.
HIDDEN = [returns for returns in RETURNS if returns not in ("of each example", "as one row")]


@pytest.mark.parametrize(
    ("returns", "capture", "kind"),
    [(returns, "auto", "exact") for returns in RETURNS]
    + [(returns, "shadow", "exact") for returns in HIDDEN]
    + [("a function", "auto", "empirical"), ("in a list", "auto", "mc"), ("of each example", "auto", "empirical")],
)
def test_what_it_returns_counts(returns: str, capture: str, kind: str) -> None:
    x, y = batch(6)
    plain, model = mlp(), Returning(RETURNS[returns])
    found = []
    for watched, loss in ((plain, lambda: CE(plain(x), y)), (model, lambda: minimised(model(x, y)))):
        optimizer = watching(
            watched, CE, "ekfac", kind, curvature_ema=0.0, capture="auto" if watched is plain else capture
        )
        for part in range(2):  # accumulated
            (loss() * (0.25 + 0.5 * part)).backward()
        optimizer.step()
        optimizer.detach()
        found.append({name.replace("net.", ""): block for name, block in statistics(optimizer).items()})
    assert_same(found[1], found[0], rtol=1e-10)


def test_an_output_of_one_number_is_no_loss() -> None:
    """Of an example without an axis for examples, say."""
    x = batch(1)[0]
    found = []
    for returned in (lambda z: z, lambda z: z.squeeze()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        wrapped = Returning(lambda z, y, returned=returned: returned(z))
        wrapped.net = model
        optimizer = watching(wrapped, nn.MSELoss(), "kfac", "exact", curvature_ema=0.0)
        z = wrapped(x, x)
        nn.MSELoss()(z, torch.ones_like(z)).backward()
        optimizer.step()
        optimizer.detach()
        found.append(statistics(optimizer))
    assert_same(found[1], found[0], rtol=1e-10)
