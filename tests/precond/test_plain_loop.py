"""Is an optimizer a ``torch.optim.Optimizer`` in everything a loop does with one?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from precond import EKFAC, KFAC, Momentum, PreconditionedOptimizer
from tests.curvature.loops import batch, mlp, run
from tests.curvature.problems import PROBLEMS

X, Y = batch(16)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, steps: int = 3) -> list[Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(X), Y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def trained(steps: int = 3, **options: Any) -> list[Tensor]:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    return train(model, KFAC(model, loss_fn, **{"lr": 0.1, **options}), loss_fn, steps)


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("make", [KFAC, EKFAC])
@pytest.mark.parametrize("name", ["mlp_mse", "residual_train", "encoder_pre_norm", "language_model", "unknown_uses"])
def test_the_loop_of_the_readme_lowers_the_loss_and_moves_every_parameter(name: str, make: Any) -> None:
    problem = PROBLEMS[name]()
    model, loss_fn = problem.model.train(), problem.loss_fn
    optimizer = make(model, loss_fn, lr=0.1, damping=1e-2, kl_clip=0.1, momentum=0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(20):
        x, y = problem.data[0]
        optimizer.zero_grad()
        z = run(model, x)
        loss = loss_fn(z, y) if problem.class_dim is None else loss_fn(z.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    still = [
        n for n, p in model.named_parameters() if torch.equal(p, before[n]) and p.grad is not None and p.grad.any()
    ]
    assert not still


# Options -------------------------------------------------------------------------------------------------------------


def test_groups_have_their_own_options() -> None:
    """A frozen-by-lr group stays, the others move as they would alone."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0, "weight_decay": 0.5},
        {"params": model[2].parameters(), "weight_decay": 0.1, "damping": 0.7, "momentum": 0.0},
    ]
    optimizer = KFAC(model, loss_fn, lr=0.1, params=groups, fisher="exact")
    before = [p.clone() for p in model.parameters()]
    after = train(model, optimizer, loss_fn, 1)
    assert equal(before[:2], after[:2])
    other = mlp()
    alone = KFAC(other, loss_fn, lr=0.1, params="2.*", fisher="exact", weight_decay=0.1, damping=0.7, momentum=0.0)
    assert equal(train(other, alone, loss_fn, 1), after)


def test_named_parameters_and_globs_choose_parameters() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    before = [p.clone() for p in model.parameters()]
    after = train(model, KFAC(model, loss_fn, lr=0.1, params=["2.*"]), loss_fn)
    assert equal(before[:2], after[:2]) and not any(
        torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True)
    )
    other = mlp()
    named = [{"params": [(n, p) for n, p in other.named_parameters() if n.startswith("2")]}]
    assert equal(train(other, KFAC(other, loss_fn, lr=0.1, params=named), loss_fn), after)


def test_a_learning_rate_may_be_a_tensor() -> None:
    for options in ({}, {"weight_decay": 0.1}, {"kl_clip": 1e-3}, {"momentum": Momentum(0.9, nesterov=True)}):
        for a, b in zip(
            trained(lr=torch.tensor(0.1, dtype=torch.float64), **options), trained(lr=0.1, **options), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-12)


def test_maximize_climbs() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    before = loss_fn(model(X), Y)
    train(model, KFAC(model, loss_fn, lr=0.05, maximize=True), loss_fn)
    assert loss_fn(model(X), Y) > before


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of_model", [True, False])
def test_every_way_to_empty_the_gradients(set_to_none: bool, of_model: bool) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    for _ in range(3):
        (model if of_model else optimizer).zero_grad(set_to_none=set_to_none)
        loss_fn(model(X), Y).backward()
        optimizer.step()
    for p, expected in zip(model.parameters(), trained(), strict=True):
        assert torch.allclose(p, expected, rtol=1e-10, atol=1e-13)


def test_gradients_emptied_between_the_passes_change_nothing() -> None:
    """``loss = ...; zero_grad(); backward(); step()`` is as common an order."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    for _ in range(3):
        loss = loss_fn(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert equal([p.detach() for p in model.parameters()], trained())


# Closures and hooks --------------------------------------------------------------------------------------------------


def test_closures() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(X), Y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[0] > losses[-1] and losses[0].requires_grad
    assert equal([p.detach() for p in model.parameters()], trained())


def test_step_hooks_run_around_the_step() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    seen: list[tuple[str, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", model[0].weight.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", model[0].weight.detach().clone())))
    train(model, optimizer, loss_fn, 1)
    assert [name for name, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])


# Schedulers ----------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 2)),  # starts from zero
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)], o),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 2),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {
        name
        for name, member in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(member, lr_scheduler.LRScheduler) and not name.startswith("_") and name != "LRScheduler"
    }
    assert known <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """The learning rates are those of SGD, and the steps follow them."""
    rates = []
    for make in (lambda m, f: KFAC(m, f, lr=0.1, momentum=0.9), lambda m, f: torch.optim.SGD(m.parameters(), 0.1, 0.9)):
        model, loss_fn = mlp(), nn.CrossEntropyLoss()
        optimizer = make(model, loss_fn)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for _ in range(5):
            before = [p.detach().clone() for p in model.parameters()]
            train(model, optimizer, loss_fn, 1)
            rate = optimizer.param_groups[0]["lr"]
            seen.append((rate, optimizer.param_groups[0]["momentum"]))
            moved = not equal(before, [p.detach() for p in model.parameters()])
            assert moved == (rate > 0)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        rates.append(seen)
    assert rates[0] == rates[1]


# precondition() ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_clip", [None, 1e-6])
def test_precondition_is_the_first_half_of_step(kl_clip: float | None) -> None:
    model, other, loss_fn = mlp(), mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, kl_clip=kl_clip)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(X), Y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.precondition()
        assert equal(before, [p.detach() for p in model.parameters()])
        optimizer.step()  # does not do it twice
    assert optimizer.steps == 3
    assert equal(
        [p.detach() for p in model.parameters()], train(other, KFAC(other, loss_fn, lr=0.1, kl_clip=kl_clip), loss_fn)
    )


def test_precondition_takes_a_closure() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, kl_clip=None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(X), Y)
        loss.backward()
        return loss

    assert optimizer.precondition(closure) > 0
    optimizer.step()
    assert equal([p.detach() for p in model.parameters()], trained(1, kl_clip=None))


def test_any_torch_optimizer_may_take_the_second_half() -> None:
    """AdamW on ``C^-1 g``, written out."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer: PreconditionedOptimizer = KFAC(
        model, loss_fn, lr=0.0, fisher="exact", damping=0.05, inverse_update_period=1
    )
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    p = model[2].weight.detach().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 4):
        optimizer.zero_grad()
        loss_fn(model(X), Y).backward()
        gradient = torch.cat([model[2].weight.grad, model[2].bias.grad.unsqueeze(1)], 1).flatten()
        optimizer.precondition()
        damped = optimizer.damping(optimizer.preconditioners["2.weight+2.bias"].estimator.operator()).to_dense()
        direction = torch.linalg.solve(damped, gradient).reshape(3, 6)[:, :-1]
        adam.step()
        m, v = 0.9 * m + 0.1 * direction, 0.99 * v + 0.01 * direction**2
        p = p * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        assert torch.allclose(model[2].weight, p, rtol=1e-8)


def test_a_new_gradient_after_precondition_is_preconditioned_again() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    loss_fn(model(X), Y).backward()
    optimizer.precondition()
    optimizer.zero_grad()
    loss_fn(model(X), Y).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert optimizer.steps == 2
    for p, q, g in zip(model.parameters(), before, plain, strict=True):
        assert not torch.allclose(p - q, -0.1 * g)
