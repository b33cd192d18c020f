"""Are calls of one loss module told apart by the models they are about?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import KFAC, LevenbergMarquardt, PreconditionedOptimizer, QuadraticModel
from tests.curvature.loops import assert_same, statistics, watching

Model = nn.Module


def models() -> tuple[Model, Model, Tensor, Tensor]:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    b = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return a, b, torch.randn(6, 4).double(), torch.randn(6, 3).double()


def alone(which: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model, loss_fn = models()[which], nn.MSELoss()
    optimizer = watching(model, loss_fn)
    loss_fn(model(x), y).backward()
    optimizer.step()
    return statistics(optimizer)


def orders() -> list[str]:
    """Every order of the forward passes, losses and backward passes of two models (upper case: the second)."""
    out = []
    for places in itertools.combinations(range(6), 3):
        first, second = iter("flb"), iter("FLB")
        out.append("".join(next(first) if i in places else next(second) for i in range(6)))
    return out


@pytest.mark.parametrize("order", orders())
def test_two_models_learn_their_own_curvature_in_any_order(order: str) -> None:
    *pair, x, y = models()
    shared = nn.MSELoss()
    optimizers = [watching(model, shared) for model in pair]
    z: dict[int, Tensor] = {}
    loss: dict[int, Tensor] = {}
    for event in order:
        i = int(event.isupper())
        if event in "fF":
            z[i] = pair[i](x if i == 0 else 2 * x)
        elif event in "lL":
            loss[i] = shared(z[i], y)
        else:
            loss[i].backward()
    for i in (0, 1):
        optimizers[i].step()
        assert_same(statistics(optimizers[i]), alone(i, x if i == 0 else 2 * x, y))


@pytest.mark.parametrize("weight", [3.0, -3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("order", ["fFlL", "fFLl", "flFL", "FLfl", "FfLl"])
def test_two_losses_in_one_backward_pass_keep_their_weights_and_counts(
    order: str, reduction: str, weight: float
) -> None:
    """The second model sees five times as many numbers, with another weight and perhaps another sign."""

    def learn(model: Model, loss_fn: nn.Module, factor: float, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        optimizer = watching(model, loss_fn)
        (factor * loss_fn(model(x), y)).backward()
        optimizer.step()
        return statistics(optimizer)

    *pair, x, y = models()
    data, factors = [(x, y), (x.repeat(5, 1), y.repeat(5, 1))], [1.0, weight]
    expected = [learn(models()[i], nn.MSELoss(reduction=reduction), factors[i], *data[i]) for i in (0, 1)]
    shared = nn.MSELoss(reduction=reduction)
    optimizers = [watching(model, shared) for model in pair]
    z: dict[int, Tensor] = {}
    terms: list[Tensor] = []
    for event in order:
        i = int(event.isupper())
        if event in "fF":
            z[i] = pair[i](data[i][0])
        else:
            terms.append(factors[i] * shared(z[i], data[i][1]))
    torch.stack(terms).sum().backward()
    for i in (0, 1):
        optimizers[i].step()
        assert_same(statistics(optimizers[i]), expected[i])


@pytest.mark.parametrize("waiting", ["pass", "pass and loss", "nothing"])
def test_another_model_that_no_optimizer_watches_adds_nothing(waiting: str) -> None:
    model, other, x, y = models()
    shared = nn.MSELoss()
    optimizer = watching(model, shared)
    if waiting == "nothing":
        shared(other(x), 3 * y).backward()
    z = model(x)
    value = shared(z, y) if waiting == "pass and loss" else None
    if waiting != "nothing":
        shared(other(x), 3 * y).backward()
    (shared(z, y) if value is None else value).backward()
    optimizer.step()
    assert_same(statistics(optimizer), alone(0, x, y))


@pytest.mark.parametrize("together", [False, True])
def test_a_student_learns_from_a_trained_teacher(together: bool) -> None:
    """The teacher's own loss goes through the same module, in a backward pass of its own or in the same."""
    student, teacher, x, y = models()
    shared = nn.MSELoss()
    optimizers = [watching(student, shared), watching(teacher, shared)]
    t = teacher(x)
    losses = [shared(student(x), t.detach()), shared(t, y)]
    if together:
        sum(losses).backward()  # type: ignore[union-attr]
    else:
        for loss in losses:
            loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(statistics(optimizers[0]), alone(0, x, y))
    assert_same(statistics(optimizers[1]), alone(1, x, y))


def test_generator_and_critic_in_turn() -> None:
    """The critic's step sees no pass of the generator; the generator's loss is that of the critic's answer."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    noise, real = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    one, zero = torch.ones(6, 1).double(), torch.zeros(6, 1).double()

    def critic_step(optimizer: PreconditionedOptimizer, loss_fn: nn.Module) -> dict[str, Tensor]:
        optimizer.zero_grad()
        (loss_fn(critic(real), one) + loss_fn(critic(generator(noise).detach()), zero)).backward()
        optimizer.step()
        return statistics(optimizer)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = generator

        def forward(self, x: Tensor) -> Tensor:
            return critic(self.generator(x))

    apart = nn.BCEWithLogitsLoss()
    expected = critic_step(watching(critic, apart), apart)
    whole = watching(Whole(), apart)
    apart(whole.tape.model(noise), one).backward()
    whole.step()
    expected_generator = {name.replace("generator.", ""): m for name, m in statistics(whole).items()}
    critic.zero_grad()
    generator.zero_grad()

    shared = nn.BCEWithLogitsLoss()
    critics, generators = watching(critic, shared), watching(generator, shared)
    assert_same(critic_step(critics, shared), expected)
    generators.zero_grad()
    shared(critic(generator(noise)), one).backward()
    generators.step()
    assert_same(statistics(generators), expected_generator)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("options", [{"step_size": QuadraticModel()}, {"damping_rule": LevenbergMarquardt()}, {}])
def test_runs_are_those_of_each_model_alone(options: dict[str, Any], joint: bool) -> None:
    def train(together: bool) -> list[Tensor]:
        *pair, x, y = models()
        shared = nn.MSELoss()
        own = [shared, shared] if together else [nn.MSELoss(), nn.MSELoss()]
        optimizers = [KFAC(m, loss, lr=0.1, damping=1e-1, **options) for m, loss in zip(pair, own, strict=True)]
        for _ in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            z = [model(x) for model in pair]
            losses = [loss(output, y) for loss, output in zip(own, z, strict=True)]
            for loss in [torch.stack(losses).sum()] if joint else losses:
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for model in pair for p in model.parameters()]

    for a, b in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
