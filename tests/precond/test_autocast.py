"""Does a step inside ``torch.autocast`` compute as outside, while the user's closure keeps its region?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import GaussNewton, methods

LOSS = nn.MSELoss()
METHODS = {method.name: method for method in methods()}
OPTIONS: dict[str, dict[str, Any]] = {"MFAC": {"window": 4}, "GaLore": {"rank": 2}, "Newton": {"damping": 10.0}}


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=generator), torch.randn(12, 3, generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def made(name: str, model: nn.Module) -> Any:
    cls: Any = METHODS[name].cls
    options = {"lr": 0.02, **OPTIONS.get(name, {})}
    takes_model = METHODS[name].needs == "layers" or name in ("CurveBall", "HessianFree")
    return cls(model, LOSS, **options) if takes_model else cls(model.parameters(), **options)


def trained(name: str, inside: bool) -> list[Tensor]:
    """Parameters after three steps with passes in float32, ``step()`` and what it runs inside of a region or not."""
    model, (x, y) = network(), data()
    optimizer = made(name, model)

    def closure() -> Tensor:
        with torch.autocast("cpu", enabled=False):
            z = model(x)
            return (2 / y.numel()) ** 0.5 * (z - y) if isinstance(optimizer, GaussNewton) else LOSS(z, y)

    for _ in range(3):
        optimizer.zero_grad()
        if optimizer.needs != "closure":
            LOSS(model(x), y).backward()
        with autocast() if inside else nullcontext():
            optimizer.step(closure) if optimizer.needs == "closure" else optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_inside_is_the_step_outside(name: str) -> None:
    inside, outside = trained(name, True), trained(name, False)
    assert all(map(torch.equal, inside, outside))
    assert not all(map(torch.equal, outside, network().parameters()))


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "KBFGS", "SMWNaturalGradient", "TNT"])
def test_a_loop_whose_region_holds_all_of_it_is_that_of_one_around_the_passes(name: str) -> None:
    ends = []
    for whole in (True, False):
        model, (x, y) = network(), data()
        optimizer = made(name, model)
        for _ in range(3):
            optimizer.zero_grad()
            with autocast():
                loss = LOSS(model(x), y)
                if whole:
                    loss.backward()
                    optimizer.step()
            if not whole:
                loss.backward()
                optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SOAP", "KFAC", "AdaHessian", "HessianFree"])
def test_a_closure_keeps_the_region_of_its_step(name: str) -> None:
    model, (x, y) = network(), data()
    optimizer, seen = made(name, model), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = model(x)
        seen.append(z.dtype)
        loss = LOSS(z.float(), y)
        if optimizer.needs != "closure":
            loss.backward()
        return loss

    with autocast():
        optimizer.step(closure)
        assert (x @ x.mT).dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}
    optimizer.step(closure)
    assert seen[-1] == torch.float32


def test_a_region_around_the_whole_training_sees_the_parameters_move() -> None:
    model, (x, y) = network(), data()
    optimizer = made("KFAC", model)
    with autocast():
        LOSS(model(x), y).backward()
        optimizer.step()
        after = model(x)
    with autocast():
        torch.testing.assert_close(after, model(x), rtol=0, atol=0)
