"""Are settings of the loop checked, and refused where they have no effect?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precond import EKFAC, KFAC, SENG, SOAP, Loop, Muon


def test_values_out_of_range() -> None:
    with pytest.raises(ValueError, match="nonfinite must be 'skip' or 'raise', got 'ignore'"):
        Loop(nonfinite="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_skips must be a whole number of steps, at least 1, got 0"):
        Loop(max_skips=0)
    with pytest.raises(ValueError, match="capture must be one of 'auto', 'loss', 'gradient', 'shadow', got 'hooks'"):
        KFAC(nn.Linear(2, 2), nn.MSELoss(), lr=0.1, loop=Loop(capture="hooks"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "setting", [{"output": abs}, {"class_dim": 1}, {"capture": "shadow"}, {"eval_mode": True}, {"seed": 3}]
)
@pytest.mark.parametrize("cls", [SOAP, Muon])
def test_methods_on_gradients_refuse_what_has_no_effect(cls: Any, setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}: loop=Loop\({name}=.*\) has no effect on it; of Loop it uses"
    ):
        cls(nn.Linear(2, 2).parameters(), loop=Loop(**setting))


def test_settings_reach_what_they_are_for() -> None:
    layer = nn.Linear(2, 2)
    loop = Loop(output=lambda result: result[0], class_dim=1, capture="gradient", eval_mode=True, seed=5, max_skips=2)
    optimizer = KFAC(layer, nn.CrossEntropyLoss(), lr=0.1, loop=loop)
    tape = optimizer.tape
    assert (optimizer.statistics.class_dim, tape.mode, tape.eval_mode) == (1, "gradient", True)
    assert optimizer.loop is loop
    sketched: Any = SENG(layer, nn.CrossEntropyLoss(), lr=0.1, loop=loop)
    assert sketched.curvature.seed == 5


def test_the_seed_decides_the_draws() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        layer, loss_fn = nn.Linear(3, 2), nn.CrossEntropyLoss()
        optimizer = EKFAC(layer, loss_fn, lr=0.1, loop=Loop(seed=seed))
        loss_fn(layer(torch.randn(8, 3)), torch.arange(8) % 2).backward()
        optimizer.step()
        found.append(layer.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
