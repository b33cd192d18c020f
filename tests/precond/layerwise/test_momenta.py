"""Is the length of the momentum, which the bound rests on, that in the metric of the last refresh?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond import EKFAC, KFAC
from precond.layerwise.blocks import rows as rows_of_layers


@pytest.mark.parametrize(
    ("method", "examples", "triangles"), [(KFAC, 4, True), (KFAC, 64, False), (EKFAC, 4, False)], ids=str
)
def test_a_momentum_has_its_length_in_the_newest_metric(
    method: type[KFAC], examples: int, triangles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are solved for by triangles, many by inverses; both are renewed in every step here."""
    monkeypatch.setattr(rows_of_layers, "WORTH", 0)
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 20)).double(), nn.MSELoss()
    optimizer = method(
        model, loss_fn, lr=1e-2, damping=0.1, momentum=0.9, fisher="empirical", kl_clip=1e-3, curvature_update_period=1
    )
    for _ in range(4):
        x, y = torch.randn(examples, 30).double(), torch.randn(examples, 20).double()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    for kept in optimizer.preconditioners.values():
        assert (kept.triangles is not None) == triangles
        states = {name: optimizer.state[optimizer.parameters[name]] for name in kept.estimator.block.names}
        v = kept.estimator.block.read({name: state["momentum_buffer"] for name, state in states.items()}).reshape(-1)
        expected = v @ torch.linalg.solve(kept.inverse.to_dense(), v)
        torch.testing.assert_close(sum(state["length"] for state in states.values()), expected)
