"""Does every way of weight decay do what its definition says, and what ``torch`` does where it has it?"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from precond import KFAC, SOAP, AdaHessian, CurveBall, GaLore, GaussNewton, Momentum, Newton, Sophia, WeightDecay
from precond.layerwise.blocks import rows as rows_of_layers
from precond.step.base import SecondOrderOptimizer
from tests.precond import references as ref
from tests.precond.test_protocol import Training, same

STEPS = 12
LR, WEIGHT = 0.05, 0.3


class Plain(SecondOrderOptimizer):
    """The step without a curvature."""

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return {p: g.clone() for p, g in gradients.items()}


def trajectory(make: Any, schedule: Any = None, steps: int = STEPS) -> Tensor:
    """Values ``(steps, 6)`` under gradients that depend on the step alone."""
    p = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))  # both signs
    optimizer = make([p])
    scheduler = schedule(optimizer) if schedule else None
    out = []
    for step in range(steps):
        p.grad = gradient(step)
        optimizer.step()
        if scheduler:
            scheduler.step()
        out.append(p.detach().clone())
    return torch.stack(out)


def gradient(step: int) -> Tensor:
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("kind", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}])
def test_l2_is_that_of_sgd(options, kind):
    momentum = Momentum(options.get("momentum", 0.0), options.get("nesterov", False))
    own = {"momentum": momentum, "maximize": options.get("maximize", False)}
    ours = trajectory(lambda p: Plain(p, lr=kind(LR), weight_decay=WeightDecay(WEIGHT, "l2"), **own))
    theirs = trajectory(lambda p: torch.optim.SGD(p, lr=kind(LR), weight_decay=WEIGHT, **options))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("make", "twin"),
    [
        (lambda p, **o: SOAP(p, betas=(0.8, 0.9), **o), "Adam"),  # a vector is not rotated
        (lambda p, **o: GaLore(p, inner_options={"betas": (0.8, 0.9)}, **o), "Adam"),  # nor projected
    ],
    ids=["SOAP", "GaLore"],
)
@pytest.mark.parametrize("decay", ["l2", "decoupled"])
def test_adam_and_adamw(make, twin, decay, maximize):
    ours = trajectory(lambda p: make(p, lr=LR, weight_decay=WeightDecay(WEIGHT, decay), maximize=maximize))
    cls = torch.optim.Adam if decay == "l2" else torch.optim.AdamW
    theirs = trajectory(lambda p: cls(p, lr=LR, betas=(0.8, 0.9), weight_decay=WEIGHT, maximize=maximize))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert not torch.equal(ours, trajectory(lambda p: make(p, lr=LR, maximize=maximize)))


def naive(decay: str, rates: list[float], peak: float, momentum: float = 0.0) -> Tensor:
    """Entry by entry, from the definitions, in plain floats."""
    values, velocity, out = torch.linspace(-1, 1, 6, dtype=torch.float64).tolist(), [0.0] * 6, []
    for step, lr in enumerate(rates):
        g = gradient(step).tolist()
        for i, p in enumerate(values):
            velocity[i] = momentum * velocity[i] + g[i]
            u = velocity[i]
            shrink = {
                "decoupled": lr * WEIGHT,
                "independent": lr / peak * WEIGHT,
                "corrected": lr * lr / peak * WEIGHT,
                "cautious": lr * WEIGHT if u * p >= 0 else 0.0,
            }[decay]
            values[i] = p - lr * u - shrink * p
        out.append(list(values))
    return torch.tensor(out, dtype=torch.float64)


COSINE = [LR * (1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]


@pytest.mark.parametrize("kind", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", ["decoupled", "independent", "corrected", "cautious"])
def test_the_definition_under_a_schedule(decay, momentum, kind):
    ours = trajectory(
        lambda p: Plain(p, lr=kind(LR), momentum=momentum, weight_decay=WeightDecay(WEIGHT, decay)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    )
    torch.testing.assert_close(ours, naive(decay, COSINE, LR, momentum), rtol=0, atol=1e-14)


@pytest.mark.parametrize("decay", ["independent", "corrected"])
def test_the_peak_is_the_largest_rate_of_the_scheduler(decay):
    rates: list[float] = []

    def schedule(optimizer):
        scheduler = lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS + 1, cycle_momentum=False)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return scheduler

    ours = trajectory(lambda p: Plain(p, lr=1e-3, weight_decay=WeightDecay(WEIGHT, decay)), schedule)
    assert max(rates) > 0.9 * LR > rates[0] * 10
    torch.testing.assert_close(ours, naive(decay, rates, LR), rtol=0, atol=1e-14)


@pytest.mark.parametrize("decay", ["independent", "corrected"])
def test_without_a_scheduler_the_peak_is_the_first_rate_also_after_a_checkpoint(decay):
    def changed(optimizer):
        class Halve:
            def step(self):
                optimizer.param_groups[0]["lr"] /= 2

        return Halve()

    rates = [LR / 2**t for t in range(STEPS)]
    ours = trajectory(lambda p: Plain(p, lr=LR, weight_decay=WeightDecay(WEIGHT, decay)), changed)
    torch.testing.assert_close(ours, naive(decay, rates, LR), rtol=0, atol=1e-14)

    p = nn.Parameter(torch.ones(2))
    first, second = (Plain([p], lr=lr, weight_decay=WeightDecay(WEIGHT, decay)) for lr in (LR, 1.0))
    first.param_groups[0]["lr"] = LR / 8
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["initial_lr"] == LR and second.param_groups[0]["lr"] == LR / 8


def test_cautious_decay_ascends_with_the_step_that_is_taken():
    ours = trajectory(lambda p: Plain(p, lr=LR, weight_decay=WeightDecay(WEIGHT, "cautious"), maximize=True), steps=1)
    p, g = torch.linspace(-1, 1, 6, dtype=torch.float64), gradient(0)
    agree = (-g * p >= 0).double()
    assert 0 < agree.sum() < 6
    torch.testing.assert_close(ours[0], p + LR * g - LR * WEIGHT * agree * p, rtol=0, atol=1e-15)


def test_the_ways_may_differ_from_group_to_group():
    ways = ["decoupled", "l2", "cautious", "independent", "corrected"]
    params = [nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64)) for _ in ways]
    groups = [{"params": [p], "decay": way} for p, way in zip(params, ways, strict=True)]
    optimizer = Plain(groups, lr=LR, weight_decay=WEIGHT)
    for p in params:
        p.grad = gradient(0)
    optimizer.step()
    for p, way in zip(params, ways, strict=True):
        alone = trajectory(lambda q, way=way: Plain(q, lr=LR, weight_decay=WeightDecay(WEIGHT, way)), steps=1)
        assert torch.equal(p.detach(), alone[0]), way


# L2 in methods with a matrix


def penalty(params) -> Tensor:
    return 0.5 * WEIGHT * sum(p.square().sum() for p in params)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "NaturalGradient", "SOAP", "Shampoo", "Muon", "MFAC"])
def test_l2_is_the_gradient_of_the_penalty(name):
    ours, by_hand = Training(name, weight_decay=WeightDecay(WEIGHT, "l2")), Training(name)
    for step in range(5):
        ours.step(step)
        by_hand.optimizer.zero_grad()
        by_hand.loss(step).backward()
        with torch.no_grad():
            for p in by_hand.model.parameters():
                p.grad = p.grad.add(p, alpha=WEIGHT)
        by_hand.optimizer.step()
    for a, b in zip(ours.values(), by_hand.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not same(ours.values(), Training(name).values())


def test_l2_does_not_go_through_the_rows_of_a_layer(monkeypatch):
    """K-FAC may apply its inverse to the few rows that made a gradient; the penalty is not among these."""
    monkeypatch.setattr(rows_of_layers, "WORTH", 0)

    def run(by_hand: bool = False, **options: Any) -> tuple[list[Tensor], set[int], KFAC]:
        model, loss_fn = nn.Linear(32, 32, dtype=torch.float64), nn.CrossEntropyLoss()
        nn.init.eye_(model.weight), nn.init.zeros_(model.bias)
        optimizer, rows = KFAC(model, loss_fn, lr=0.1, fisher="exact", inverse_update_period=2, **options), set()
        x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for step in range(4):
            optimizer.zero_grad()
            loss_fn(model(x + step), torch.arange(4)).backward()
            if by_hand:
                with torch.no_grad():
                    for p in model.parameters():
                        p.grad = p.grad.add(p, alpha=WEIGHT)
            names = dict(model.named_parameters())
            rows.add(len(optimizer._rows({n: p.grad for n, p in names.items()})))
            optimizer.step()
        return [p.detach() for p in model.parameters()], rows, optimizer

    plain, seen, _ = run()
    assert seen == {0, 1}, "the rows are never used, so this test shows nothing"
    decayed, _, _ = run(weight_decay=WeightDecay(WEIGHT, "l2"))
    expected, _, _ = run(by_hand=True)
    for a, b, c in zip(decayed, expected, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not torch.allclose(a, c, atol=1e-3)


CLOSED = {
    "Newton": lambda p, **o: Newton(p, mode="absolute", damping=0.5, **o),
    "AdaHessian": lambda p, **o: AdaHessian(p, **o),
    "Sophia": lambda p, **o: Sophia(p, curvature_update_period=2, **o),
    "CurveBall": lambda p, **o: CurveBall(p, nn.MSELoss(), **o),
}


@pytest.mark.parametrize("name", CLOSED)
def test_l2_is_part_of_the_loss_of_a_closure(name):
    """Of its value, slope and curvature, so that steps and damping are those of a closure that adds it."""
    runs = []
    for inside in (False, True):
        model = ref.SmallModel()
        options = {} if inside else {"weight_decay": WeightDecay(WEIGHT, "l2")}
        optimizer = CLOSED[name](model.parameters(), **options)
        loss_fn = getattr(optimizer, "loss_fn", nn.MSELoss())

        def closure(step, model=model, loss_fn=loss_fn, inside=inside):
            x, y = ref.batch(step)
            return loss_fn(model(x), y) + (penalty(model.parameters()) if inside else 0)

        losses = [float(optimizer.step(lambda step=step: closure(step))) for step in range(4)]
        runs.append((losses, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-12)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_newton_solves_ridge_regression_in_one_step():
    x, y = ref.batch(0)
    x = x.flatten(1)
    weight = nn.Parameter(torch.zeros(4, 32, dtype=torch.float64))
    optimizer = Newton([weight], lr=1.0, weight_decay=WeightDecay(WEIGHT, "l2"))
    optimizer.step(lambda: 0.5 * (x @ weight.mT - y).square().sum())
    expected = torch.linalg.solve(x.mT @ x + WEIGHT * torch.eye(32, dtype=torch.float64), x.mT @ y).mT
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


# Refusals


def test_refusals():
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"form is one of decoupled, l2, .*; got 'adamw'"):
        SOAP(p, weight_decay=WeightDecay(0.1, "adamw"))
    with pytest.raises(ValueError, match=r"decay is one of decoupled, l2, .*; got 'adamw'"):
        SOAP([{"params": p, "decay": "adamw"}])
    with pytest.raises(ValueError, match=r"decay='corrected' compares lr with the value it begins with, .* got 0.0"):
        SOAP(p, lr=0.0, weight_decay=WeightDecay(0.0, "corrected"))
    with pytest.raises(ValueError, match=r"let the closure also return weight\*\*0.5 \* p"):
        GaussNewton(p, weight_decay=WeightDecay(0.1, "l2"))
    with pytest.raises(TypeError, match="SOAP has no option 'weigth_decay'; did you mean 'weight_decay'"):
        SOAP(p, weigth_decay=0.1)
