"""Are the objects of options the plain entries of the groups that checkpoints and schedulers know?"""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from precond import KFAC, SOAP, Doubling, Momentum, PreconditionedOptimizer, Refresh, WeightDecay
from solvers import Eigh


def kfac(**options: Any) -> KFAC:
    return KFAC(nn.Linear(3, 2), nn.MSELoss(), lr=0.1, **options)


def test_groups_hold_what_they_held() -> None:
    group = kfac(momentum=Momentum(0.8, nesterov=True), weight_decay=WeightDecay(0.1, "l2")).param_groups[0]
    assert {key: group[key] for key in ("momentum", "nesterov", "weight_decay", "decay")} == {
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.1,
        "decay": "l2",
    }
    plain = kfac(momentum=0.8, weight_decay=0.1).param_groups[0]
    assert plain.keys() == group.keys()
    assert (plain["nesterov"], plain["decay"]) == (False, "decoupled")
    refreshed = kfac(inverse_update_period=Refresh(7, burn_in=2))
    assert refreshed.param_groups[0]["inverse_update_period"] == 7 and refreshed.burn_in == 2


def test_a_group_may_have_objects_of_its_own() -> None:
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "weight_decay": WeightDecay(0.1, "cautious")}, {"params": [layer.bias]}]
    first, second = SOAP(groups, momentum=Momentum(0.5, True)).param_groups
    assert (first["weight_decay"], first["decay"]) == (0.1, "cautious")
    assert (second["weight_decay"], second["decay"]) == (0.0, "decoupled")
    assert first["nesterov"] and second["momentum"] == 0.5


def test_schedules_and_schedulers_change_the_strength() -> None:
    cycled = kfac(momentum=Momentum(0.5, nesterov=True))
    OneCycleLR(cycled, 0.1, total_steps=5, base_momentum=0.2, max_momentum=0.6)
    assert cycled.param_groups[0]["momentum"] == 0.6
    p = nn.Parameter(torch.ones(2))
    optimizer = SOAP([p], weight_decay=WeightDecay(lambda step: 0.1 / (1 + step), "l2"))
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 / 2


def test_staggering_is_the_methods_unless_it_is_said() -> None:
    parts: Any = {"damping": 0.1, "solver": Eigh(), "lr": 0.1, "curvature": {"*": "diagonal"}}
    for refresh, own, base in ((5, True, False), (Refresh(5), True, False), (Refresh(Doubling(5), True), True, True)):
        assert kfac(inverse_update_period=refresh).stagger is own
        general = PreconditionedOptimizer(nn.Linear(3, 2), nn.MSELoss(), inverse_update_period=refresh, **parts)
        assert general.stagger is base
    assert not kfac(inverse_update_period=Refresh(5, stagger=False)).stagger


def test_values_out_of_range() -> None:
    with pytest.raises(ValueError, match="form is one of decoupled, l2, independent, corrected, cautious; got 'adamw'"):
        WeightDecay(0.1, "adamw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nesterov=True needs a momentum above zero"):
        SOAP([nn.Parameter(torch.ones(2))], momentum=Momentum(0.0, nesterov=True))
    with pytest.raises(ValueError, match="momentum must be a non-negative finite number, got -1"):
        kfac(momentum=Momentum(-1.0))
    with pytest.raises(ValueError, match="inverse_update_period must be a whole number of steps, at least 1, got 0"):
        kfac(inverse_update_period=Refresh(0))
    with pytest.raises(ValueError, match=r"burn_in is a whole number of steps, at least 0; got 0\.5"):
        Refresh(5, burn_in=0.5)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        Momentum(0.9).strength = 0.5  # type: ignore[misc]
