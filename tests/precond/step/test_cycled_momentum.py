"""Is the momentum that a scheduler of torch cycles the one of the method, and absent where it has none?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from precond import KFAC, SOAP, GaLore, Momentum, Muon, Newton, QuadraticModel, methods
from tests.precond.test_protocol import Training, same

NAMES = [method.name for method in methods()]
CYCLES: dict[str, Any] = {
    "one": lambda o, cycled: OneCycleLR(o, 0.02, total_steps=12, cycle_momentum=cycled),
    "triangles": lambda o, cycled: CyclicLR(o, 1e-3, 0.02, step_size_up=3, cycle_momentum=cycled),
}


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("name", NAMES)
def test_a_cycle_acts_or_is_refused(name: str, cycle: str) -> None:
    ends = []
    for cycled in (False, True):
        training = Training(name)
        has = {"momentum", "betas"} & set(training.optimizer.defaults)
        if cycled and not has:
            with pytest.raises(ValueError, match="must support momentum or beta1"):
                CYCLES[cycle](training.optimizer, True)
            return
        scheduler = CYCLES[cycle](training.optimizer, cycled)
        for step in range(6):
            training.step(step)
            scheduler.step()
        ends.append(training.values())
    assert not same(*ends), "the scheduler wrote what nothing reads"


@pytest.mark.parametrize("name", NAMES)
def test_momentum_that_was_not_asked_for_stays_off(name: str) -> None:
    """Where the beta of an average is cycled, no heavy ball comes with it; the extra one is there on request."""
    optimizer: Any = Training(name).optimizer
    if "betas" in optimizer.defaults:
        OneCycleLR(optimizer, 0.02, total_steps=12)
        assert {group["momentum"] for group in optimizer.param_groups} == {0.0}
    later = nn.Parameter(torch.ones(2, 2).double())
    if name in ("SOAP", "MFAC", "Newton"):
        optimizer.add_param_group({"params": [later]})
        assert optimizer.param_groups[1]["momentum"] == optimizer.param_groups[0]["momentum"]


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: GaLore(p, lr=0.01, rank=64),
        lambda p: SOAP(p, lr=0.01, max_dim=1, betas=(0.9, 0.999)),
    ],
)
def test_what_is_adam_is_adam_under_a_cycle(make: Any, cycle: str) -> None:
    ends: list[list[Tensor]] = []
    for each in (make, lambda p: Adam(p, lr=0.01)):
        layer = nn.Linear(4, 3).double()
        nn.init.constant_(layer.weight, 0.3), nn.init.zeros_(layer.bias)
        optimizer = each(layer.parameters())
        scheduler = CYCLES[cycle](optimizer, True)
        for k in range(10):
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k)).double()
            (layer(x) - x[:, :3].sin()).square().mean().backward()
            optimizer.step()
            scheduler.step()
        ends.append([p.detach() for p in layer.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_muons_own_momentum_is_cycled_and_not_that_of_adamw() -> None:
    layer = nn.Linear(4, 3)
    optimizer = Muon(layer.parameters())
    OneCycleLR(optimizer, 0.02, total_steps=10, max_momentum=0.8)
    assert optimizer.param_groups[0]["momentum"] == 0.8 and optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": (0.5, 0.6)})
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)


def test_the_quadratic_model_keeps_its_own_momentum() -> None:
    sized = KFAC(nn.Linear(3, 2), nn.MSELoss(), lr=1.0, step_size=QuadraticModel())
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        OneCycleLR(sized, 1.0, total_steps=5)
    asked = Newton([nn.Parameter(torch.ones(2))], momentum=Momentum(0.5))
    OneCycleLR(asked, 1.0, total_steps=5, max_momentum=0.7)
    assert asked.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: 0.5**step),
        lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=3),
        lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0),
    ],
    ids=["lambda", "swa", "plateau"],
)
def test_schedules_of_the_rate_act(name: str, schedule: Any) -> None:
    ends = []
    for scheduled in (False, True):
        training = Training(name)
        scheduler = schedule(training.optimizer) if scheduled else None
        for step in range(4):
            training.step(step)
            if scheduler is not None:
                scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        ends.append(training.values())
    assert not same(*ends)
