"""Steps as engines call them: with closures that ran the backward pass, or under a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import (
    EKFAC,
    KFAC,
    PSGD,
    SOAP,
    AdaHessian,
    LevenbergMarquardt,
    Muon,
    QuadraticModel,
    SecondOrderOptimizer,
)

LOSS = nn.CrossEntropyLoss()

Make = Callable[[nn.Module], SecondOrderOptimizer]

#: Methods that need gradients, or the tape of a plain loop.
METHODS: dict[str, Make] = {
    "PSGD": lambda model: PSGD(model.parameters(), lr=0.01),
    "SOAP": lambda model: SOAP(model.parameters(), lr=0.01),
    "KFAC": lambda model: KFAC(model, LOSS, lr=0.05, fisher="exact"),
    "EKFAC, momentum by a quadratic model": lambda model: EKFAC(
        model, LOSS, lr=1.0, fisher="exact", step_size=QuadraticModel(max_kl=0.1)
    ),
    "KFAC, damping by a rule": lambda model: KFAC(
        model, LOSS, lr=0.05, fisher="exact", damping_rule=LevenbergMarquardt(period=1)
    ),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def run(make: Make, engine: Callable[[SecondOrderOptimizer], Callable[[Callable[[], Tensor]], Any]]) -> Tensor:
    """The parameters after three steps of an engine, which gets the closure of each batch."""
    model = network()
    optimizer = make(model)
    step = engine(optimizer)
    for number in range(3):
        x, y = batch(number)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss.detach()

        step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_loop(optimizer: SecondOrderOptimizer) -> Callable[[Callable[[], Tensor]], Any]:
    return lambda closure: (closure(), optimizer.step())


def trainer(optimizer: SecondOrderOptimizer) -> Callable[[Callable[[], Tensor]], Any]:
    return lambda closure: optimizer.step(closure)


def compiled_step(optimizer: SecondOrderOptimizer) -> Callable[[Callable[[], Tensor]], Any]:
    step = torch.compile(optimizer.step, backend="eager")
    return lambda closure: (closure(), step())


def compiled_first_half(optimizer: SecondOrderOptimizer) -> Callable[[Callable[[], Tensor]], Any]:
    half = torch.compile(optimizer.precondition, backend="eager")
    return lambda closure: (closure(), half(), optimizer.step())


@pytest.mark.parametrize("name", METHODS)
def test_a_closure_that_ran_the_backward_pass_is_a_plain_loop(name: str) -> None:
    assert torch.equal(run(METHODS[name], trainer), run(METHODS[name], plain_loop))


def test_second_derivatives_still_need_the_graph_of_the_loss() -> None:
    with pytest.raises(TypeError, match=r"Return the loss itself, not loss\.item\(\) or loss\.detach\(\)"):
        run(lambda model: AdaHessian(model.parameters()), trainer)


@pytest.mark.parametrize("backward", [False, True])
def test_the_closure_of_a_method_that_needs_gradients_may_leave_the_backward_pass_to_it(backward: bool) -> None:
    model = network()
    optimizer = PSGD(model.parameters(), lr=0.01)
    for number in range(3):
        x, y = batch(number)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            if backward:
                loss.backward()
            return loss

        optimizer.step(closure)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), run(METHODS["PSGD"], plain_loop))


@pytest.mark.parametrize("engine", [compiled_step, compiled_first_half])
@pytest.mark.parametrize("make", [METHODS["SOAP"], METHODS["KFAC"], lambda model: Muon(model.parameters(), lr=0.01)])
def test_a_compiler_leaves_the_step_alone(make: Make, engine: Any) -> None:
    torch.compiler.reset()
    assert torch.equal(run(make, engine), run(make, plain_loop))
