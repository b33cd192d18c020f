"""Under Accelerate: equal to the plain loop, and what the wrapped optimizer answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature
from precond import EKFAC, KFAC, PSGD, SOAP, AdaHessian, IterateAverage, LevenbergMarquardt, QuadraticModel
from precond.integrations import inner_optimizer

accelerate = pytest.importorskip("accelerate")

LOSS = nn.CrossEntropyLoss()
X = torch.linspace(-1, 1, 96).reshape(24, 4).sin()
Y = torch.arange(24) * 7 % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loader() -> Any:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lambda m: KFAC(m, LOSS, lr=0.05),
    "EKFAC": lambda m: EKFAC(m, LOSS, lr=0.05, inverse_update_period=2),
    "KFAC, rule": lambda m: KFAC(m, LOSS, lr=0.05, damping_rule=LevenbergMarquardt(period=1)),
    "KFAC, model": lambda m: KFAC(m, LOSS, lr=1.0, step_size=QuadraticModel()),
    "SOAP": lambda m: SOAP(m.parameters(), lr=0.05),
    "PSGD": lambda m: PSGD(m.parameters(), lr=0.05),
}


def accelerated(make: Any, parts: int = 1, clip: float = 0.0, **options: Any) -> tuple[Tensor, Any]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts, **options)
    model = network()
    model, optimizer, data = accelerator.prepare(model, make(model), loader())
    for x, y in data:
        with accelerator.accumulate(model):
            loss = LOSS(model(x), y)
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return flat(accelerator.unwrap_model(model)), optimizer


def plain(make: Any, parts: int = 1, clip: float = 0.0, bf16: bool = False) -> Tensor:
    model = network()
    optimizer = make(model)
    if bf16:  # the model runs in half precision and returns float32, as prepare() makes it
        forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        model.forward = lambda x: forward(x).float()  # type: ignore[method-assign]
    for number, (x, y) in enumerate(loader(), 1):
        (LOSS(model(x), y) / parts).backward()
        if number % parts == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "more"),
    [({}, {}), ({"clip": 0.1}, {}), ({"parts": 2}, {}), ({}, {"mixed_precision": "bf16"})],
    ids=["plain", "clipped", "accumulated", "bf16"],
)
def test_loops(name: str, options: dict[str, Any], more: dict[str, Any]) -> None:
    found, optimizer = accelerated(METHODS[name], **options, **more)
    assert torch.equal(found, plain(METHODS[name], **options, bf16="mixed_precision" in more))
    assert inner_optimizer(optimizer).metrics()["steps"] == 6 // options.get("parts", 1)


def test_a_wrapped_closure_is_passed_on() -> None:
    accelerator, ours, theirs = accelerate.Accelerator(cpu=True), network(), network()
    plain_one = AdaHessian(theirs.parameters())
    ours, wrapped = accelerator.prepare(ours, AdaHessian(ours.parameters()))
    for x, y in loader():
        wrapped.step(lambda x=x, y=y: LOSS(ours(x), y))
        plain_one.step(lambda x=x, y=y: LOSS(theirs(x), y))
    assert torch.equal(flat(accelerator.unwrap_model(ours)), flat(theirs))


def test_the_first_half_under_another_optimizer() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours, theirs = network(), network()
    ours, kfac, adam, data = accelerator.prepare(
        ours, KFAC(ours, LOSS, lr=1.0), torch.optim.AdamW(ours.parameters(), lr=0.01), loader()
    )
    for x, y in data:
        with accelerator.accumulate(ours):
            accelerator.backward(LOSS(ours(x), y))
            if accelerator.sync_gradients:
                inner_optimizer(kfac).precondition()
            adam.step()
            adam.zero_grad()
    first, second = KFAC(theirs, LOSS, lr=1.0), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for number, (x, y) in enumerate(loader(), 1):
        (LOSS(theirs(x), y) / 2).backward()
        if number % 2 == 0:
            first.precondition()
            second.step()
            second.zero_grad()
    assert torch.equal(flat(accelerator.unwrap_model(ours)), flat(theirs))


def test_wrapped_optimizers_are_looked_into() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer, data = accelerator.prepare(model, KFAC(model, LOSS, lr=0.05), loader())
    average = IterateAverage(optimizer, decay=0.5)
    monitor = curvature.Monitor(
        model, LOSS, (X, Y), every=1, quantities=["sharpness", "factors"], optimizer=optimizer, max_fraction=None
    )
    for x, y in data:
        accelerator.backward(LOSS(model(x), y))
        optimizer.step()
        row = monitor.step()
        optimizer.zero_grad()
    assert row is not None and row["steps"] == 6 and "0.weight+0.bias/largest" in row and "stability" in row
    assert average.steps == 6
    assert {r.structure for r in inner_optimizer(optimizer).coverage()} == {"kronecker"}  # type: ignore[attr-defined]
    optimizer_of_model = curvature.dynamics(model, LOSS, (X, Y), optimizer, progress=False)
    assert optimizer_of_model is not None


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "SOAP"])
def test_save_state_and_load_state(name: str, tmp_path: Path) -> None:
    def run(accelerator: Any, parts: Any, batches: Any) -> None:
        model, optimizer = parts
        for x, y in batches:
            accelerator.backward(LOSS(model(x), y))
            optimizer.step()
            optimizer.zero_grad()

    batches = list(loader())
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    whole = accelerator.prepare(model, METHODS[name](model))
    run(accelerator, whole, batches[:3])
    accelerator.save_state(str(tmp_path))
    run(accelerator, whole, batches[3:])
    again = accelerate.Accelerator(cpu=True)
    model = network()
    resumed = again.prepare(model, METHODS[name](model))
    again.load_state(str(tmp_path))
    run(again, resumed, batches[3:])
    assert torch.equal(flat(again.unwrap_model(resumed[0])), flat(accelerator.unwrap_model(whole[0])))
