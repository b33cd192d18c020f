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
    CurveBall,
    GaussNewton,
    HessianFree,
    LevenbergMarquardt,
    Muon,
    Newton,
    QuadraticModel,
    SecondOrderOptimizer,
    Sophia,
    WeightDecay,
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


#: Methods that need the graph of the loss, which a trainer's closure does not return.
SECOND: dict[str, Make] = {
    "PSGD, by Hessian": lambda model: PSGD(model.parameters(), lr=0.01, criterion="hessian"),
    "Sophia": lambda model: Sophia(model.parameters(), lr=0.01, curvature_update_period=2),
    "AdaHessian": lambda model: AdaHessian(model.parameters(), lr=0.01),
    "AdaHessian, L2": lambda model: AdaHessian(model.parameters(), lr=0.01, weight_decay=WeightDecay(0.1, "l2")),
    "CurveBall": lambda model: CurveBall(model, LOSS),
    "CurveBall, L2": lambda model: CurveBall(model, LOSS, weight_decay=WeightDecay(0.1, "l2")),
    "HessianFree": lambda model: HessianFree(model, LOSS),
    "Newton": lambda model: Newton(model.parameters(), damping_rule=LevenbergMarquardt(), damping=1.0),
}


def plain_closure(loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor], make: Make) -> Tensor:
    """The parameters after three steps of a closure that returns the loss."""
    model = network()
    optimizer = make(model)
    for number in range(3):
        x, y = batch(number)
        optimizer.step(lambda x=x, y=y: loss_of(model, x, y))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def engine_closure(
    make: Make,
    backward: Callable[[nn.Module, Tensor, Tensor], Any],
    after: Callable[[nn.Module], Any] = lambda model: None,
    zero: bool = True,
) -> Tensor:
    """The parameters after three steps of a closure that runs the backward pass, as trainers do."""
    model = network()
    optimizer = make(model)
    for number in range(3):
        x, y = batch(number)

        def closure(x: Tensor = x, y: Tensor = y) -> Any:
            if zero:
                optimizer.zero_grad()
            result = backward(model, x, y)
            after(model)
            return result

        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def whole(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = LOSS(model(x), y)
    loss.backward()
    return loss.detach()


def in_parts(model: nn.Module, x: Tensor, y: Tensor) -> float:
    total = 0.0
    for part, labels in zip(x.chunk(2), y.chunk(2), strict=True):
        loss = LOSS(model(part), labels)
        (loss / 2).backward()
        total += loss.item() / 2
    return total


def with_a_gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = LOSS(model(x), y)
    loss.backward(gradient=torch.tensor(1.0).double())


def scaled_but_returned(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = LOSS(model(x), y)
    (2 * loss).backward()
    return loss


def mean_of_parts(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return sum(LOSS(model(part), labels) / 2 for part, labels in zip(x.chunk(2), y.chunk(2), strict=True))  # type: ignore[return-value]


CLOSURES = [
    (whole, lambda model, x, y: LOSS(model(x), y)),
    (in_parts, mean_of_parts),
    (with_a_gradient, lambda model, x, y: LOSS(model(x), y)),
    (scaled_but_returned, lambda model, x, y: LOSS(model(x), y)),
]


@pytest.mark.parametrize(("backward", "loss_of"), CLOSURES, ids=["whole", "in parts", "gradient", "returned"])
@pytest.mark.parametrize("name", SECOND)
def test_the_loss_of_a_trainers_closure_is_what_it_called_backward_on(name: str, backward: Any, loss_of: Any) -> None:
    found = engine_closure(SECOND[name], backward)
    assert torch.allclose(found, plain_closure(loss_of, SECOND[name]), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found, torch.cat([p.detach().flatten() for p in network().parameters()]), atol=1e-6)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


@pytest.mark.parametrize("name", ["Sophia", "AdaHessian", "PSGD, by Hessian"])
def test_gradients_that_a_trainer_clips_count_as_clipped(name: str) -> None:
    """Against the same method under its own step hooks: the gradient is clipped between evaluation and direction."""

    def by_hand(model: nn.Module) -> SecondOrderOptimizer:
        optimizer = SECOND[name](model)
        true_gradients = optimizer.true_gradients

        def clipped() -> Any:
            clip(model)
            return true_gradients()

        optimizer.true_gradients = clipped  # type: ignore[method-assign]
        return optimizer

    found = engine_closure(SECOND[name], whole, clip)
    assert torch.equal(found, plain_closure(lambda model, x, y: LOSS(model(x), y), by_hand))
    assert not torch.allclose(found, engine_closure(SECOND[name], whole), atol=1e-6)


def read_and_clip(model: nn.Module) -> None:
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    nn.utils.clip_grad_value_([*model.parameters()], 1e3)  # torch refuses to clip where there is no gradient at all


@pytest.mark.parametrize("name", SECOND)
def test_closures_find_gradients_after_each_of_their_backward_passes(name: str) -> None:
    assert torch.equal(engine_closure(SECOND[name], whole, read_and_clip), engine_closure(SECOND[name], whole))


@pytest.mark.parametrize("name", SECOND)
def test_a_closure_that_does_not_clear_the_gradients_of_our_last_step_adds_nothing(name: str) -> None:
    assert torch.equal(engine_closure(SECOND[name], whole, zero=False), engine_closure(SECOND[name], whole))


@pytest.mark.parametrize("name", SECOND)
def test_gradients_that_a_trainer_accumulated_before_are_refused(name: str) -> None:
    model = network()
    optimizer, (x, y) = SECOND[name](model), batch(0)
    for steps in range(2):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        held = [p.grad for p in model.parameters()]
        with pytest.raises(
            RuntimeError, match=rf"closure of {type(optimizer).__name__} adds its gradients to those of "
        ):
            optimizer.step(lambda: whole(model, x, y))
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        optimizer.step(lambda: (optimizer.zero_grad(), whole(model, x, y))[1])
        assert optimizer.steps == steps + 1


def test_residuals_are_returned() -> None:
    model = network()
    optimizer = GaussNewton(model.parameters())
    with pytest.raises(TypeError, match=r"the closure of GaussNewton must return residuals"):
        optimizer.step(lambda: whole(model, *batch(0)))
    with pytest.raises(TypeError, match=r"GaussNewton called backward\(\) on what it returned, which is a loss"):
        optimizer.step(lambda: returned(model, *batch(0)))


def returned(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = LOSS(model(x), y)
    loss.backward()
    return loss


def test_a_closure_without_loss_is_refused() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    with pytest.raises(TypeError, match=r"Return the loss itself, not loss\.item\(\) or loss\.detach\(\)"):
        optimizer.step(lambda: LOSS(model(batch(0)[0]), batch(0)[1]).detach())


def test_a_closure_that_does_nothing_is_a_plain_loop_or_refused() -> None:
    """As Lightning's manual optimization passes it where the user passes none."""

    def manual(optimizer: SecondOrderOptimizer) -> Callable[[Callable[[], Tensor]], Any]:
        return lambda closure: (closure(), optimizer.step(lambda: None))

    assert torch.equal(run(METHODS["PSGD"], manual), run(METHODS["PSGD"], plain_loop))
    for make in (*SECOND.values(), METHODS["PSGD"]):
        optimizer = make(network())
        with pytest.raises(TypeError, match=r"returned None and ran no backward pass.*call step\(closure=\.\.\.\)"):
            optimizer.step(lambda: None)


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
