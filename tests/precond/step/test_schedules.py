"""Are options that are functions of the step count what they give, step by step?"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from precond import KFAC, MFAC, SOAP, CurveBall, GaLore, HessianFree, Muon, Shampoo, methods
from tests.precond.test_protocol import OPTIONS, Training, same

GRADIENT = [method.name for method in methods() if method.needs == "grad"]


def decay(step: int) -> float:
    return 0.5 * 0.8**step


def clip(step: int) -> float | None:
    return 1e-4 * (step + 1) if step > 1 else None


@pytest.mark.parametrize("name", GRADIENT)
def test_a_schedule_is_the_number_written_before_each_step(name):
    scheduled = Training(name, weight_decay=decay, kl_clip=clip)
    by_hand = Training(name)
    for step in range(6):
        for group in by_hand.optimizer.param_groups:
            group.update(weight_decay=decay(step), kl_clip=clip(step))
        scheduled.step(step)
        by_hand.step(step)
        assert same(scheduled.values(), by_hand.values())
    assert not same(scheduled.values(), Training(name).values())
    for group in scheduled.optimizer.param_groups:
        assert group["weight_decay"] == decay(5) and group["kl_clip"] == clip(5)


def run(make, steps: int = 8, start: int = 0, state=None, p=None) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) if p is None else nn.Parameter(p.detach().clone())
    optimizer = make([p])
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(start, steps):
        p.grad = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("constant", "scheduled"),
    [
        (lambda p: SOAP(p, inverse_update_period=3), lambda p: SOAP(p, inverse_update_period=lambda step: 3)),
        (lambda p: Shampoo(p, damping=0.1), lambda p: Shampoo(p, damping=lambda step: 0.1)),
        (lambda p: MFAC(p, damping=0.1), lambda p: MFAC(p, damping=lambda step: 0.1)),
        (
            lambda p: GaLore(p, rank=2, inverse_update_period=3),
            lambda p: GaLore(p, rank=2, inverse_update_period=lambda step: 3),
        ),
        (
            lambda p: Muon(p, momentum=0.8),
            lambda p: Muon(p, momentum=lambda step: torch.tensor(0.8, dtype=torch.float64)),
        ),
    ],
)
def test_a_constant_schedule_is_the_constant(constant, scheduled):
    assert torch.equal(run(constant)[0], run(scheduled)[0])
    assert not torch.equal(run(constant)[0], run(type(run(constant)[1]))[0])


def test_a_period_may_grow():
    calls = []

    class Counting(SOAP):
        def directions(self, gradients):
            calls.append(self.param_groups[0]["inverse_update_period"])
            return super().directions(gradients)

    run(lambda p: Counting(p, inverse_update_period=lambda step: 1 + step // 3))
    assert calls == [1, 1, 1, 2, 2, 2, 3, 3]


def test_a_group_has_its_own_schedule():
    p, q, r = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [p], "weight_decay": decay}, {"params": [q]}]
    optimizer = SOAP(groups, lr=0.1, weight_decay=0.25)
    optimizer.add_param_group({"params": [r], "weight_decay": lambda step: float(step)})
    assert callable(groups[0]["weight_decay"]), "the user's own dictionary has changed"
    for step in range(3):
        for t in (p, q, r):
            t.grad = torch.zeros(2, dtype=torch.float64)
        optimizer.step()
        found = [group["weight_decay"] for group in optimizer.param_groups]
        assert found == [decay(step), 0.25, float(step)]
    expected = [math.prod(1 - 0.1 * w(step) for step in range(3)) for w in (decay, lambda _: 0.25, float)]
    for t, value in zip((p, q, r), expected, strict=True):
        torch.testing.assert_close(t.detach(), torch.full_like(t, value), rtol=1e-15, atol=0)


def test_a_group_added_later_takes_the_schedule_of_the_others_at_the_step_reached():
    p, optimizer = run(lambda p: SOAP(p, weight_decay=decay), 3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[1]["weight_decay"] == decay(3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay(3)] * 2


@pytest.mark.parametrize("name", GRADIENT)
def test_a_resumed_run_goes_on_at_its_step(name):
    make = lambda p: {m.name: m.cls for m in methods()}[name](  # noqa: E731
        p, **{**OPTIONS.get(name, {}), "weight_decay": decay}
    )
    whole, _ = run(make)
    half, optimizer = run(make, 5)
    state = optimizer.state_dict()
    assert all(group["weight_decay"] == decay(4) and group["steps"] == 5 for group in state["param_groups"])
    again, resumed = run(make, 8, 5, copy.deepcopy(state), half)
    assert torch.equal(again, whole) and resumed.steps == 8


@pytest.mark.parametrize("through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_schedules_travel_with_the_optimizer(through):
    p, optimizer = run(lambda p: SOAP(p, weight_decay=decay), 3)
    twin = through(optimizer)
    q = twin.param_groups[0]["params"][0]
    for t, o in ((p, optimizer), (q, twin)):
        t.grad = torch.ones_like(t)
        o.step()
        assert o.param_groups[0]["weight_decay"] == decay(3)
    assert torch.equal(p, q)


def test_a_step_that_is_skipped_is_not_counted():
    p, optimizer = run(lambda p: SOAP(p, weight_decay=decay), 2)
    p.grad = torch.full_like(p, math.nan)
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    assert optimizer.steps == 2
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == decay(2)


def test_both_halves_of_a_step_see_the_same_numbers():
    def halves(p, optimizer):
        optimizer.precondition()
        optimizer.step()

    results = []
    for step in (halves, lambda p, optimizer: optimizer.step()):
        p, optimizer = run(lambda p: Muon(p, weight_decay=decay, momentum=lambda s: 0.5 + s / 10), 0)
        for i in range(4):
            p.grad = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            step(p, optimizer)
        assert optimizer.steps == 4
        results.append(p)
    assert torch.equal(*results)


def test_a_scheduler_of_torch_writes_what_no_schedule_does():
    p, optimizer = run(lambda p: SOAP(p, lr=0.1, weight_decay=decay), 0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    assert optimizer.param_groups[0]["weight_decay"] == decay(2)


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": decay}, TypeError, "use one of torch.optim.lr_scheduler"),
        ({"max_dim": lambda step: 3}, TypeError, "max_dim cannot follow a function of the step"),
        ({"betas": lambda step: (0.9, 0.9)}, TypeError, "betas cannot follow a function of the step"),
        (
            {"eps": lambda step: -1.0},
            ValueError,
            r"eps must be .* got -1.0. \(At step 0, by the schedule given for eps",
        ),
        ({"eps": lambda step: "small"}, TypeError, "the schedule of eps must give a number; at step 0 it gave 'small'"),
        ({"inverse_update_period": lambda step: 0.5}, ValueError, r"inverse_update_period must be a whole number"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        run(lambda p: SOAP(p, **options), 1)


@pytest.mark.parametrize("cls", [HessianFree, CurveBall])
def test_a_damping_that_is_adapted_follows_no_schedule(cls):
    with pytest.raises(TypeError, match="damping cannot follow a function of the step here"):
        cls([nn.Parameter(torch.ones(2))], nn.MSELoss(), damping=decay)


def test_a_schedule_that_leaves_its_range_stops_before_the_step():
    p, optimizer = run(lambda p: SOAP(p, weight_decay=lambda step: 1.0 - step), 2)
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weight_decay must be .* got -1.0. \(At step 2, by the schedule"):
            optimizer.step()
    assert torch.equal(p, before) and optimizer.steps == 2
    assert str(state) == str(optimizer.state_dict())


def test_an_error_inside_a_schedule_says_where():
    def broken(step):
        return [0.1, 0.2][step]

    with pytest.raises(IndexError) as caught:
        run(lambda p: SOAP(p, weight_decay=broken))
    assert caught.value.__notes__ == ["(in the schedule of weight_decay, at step 2)"]


def test_the_value_of_a_moment_is_not_loaded_as_a_constant():
    """Other options are; the unit of a damping goes with it."""

    def make(**options):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, KFAC(model, nn.MSELoss(), **options)

    model, saved = make(damping=decay, momentum=0.5)
    for _ in range(3):
        saved.zero_grad()
        saved.loss_fn(model(torch.ones(4, 3)), torch.zeros(4, 2)).backward()
        saved.step()
    state = copy.deepcopy(saved.state_dict())
    assert (
        saved.param_groups[0]["curvature_update_period"] == 2 and saved.param_groups[0]["damping_unit"] == "curvature"
    )
    _, fixed = make(curvature_update_period=1)
    fixed.load_state_dict(state)
    (group,) = fixed.param_groups
    assert (group["curvature_update_period"], group["damping"], group["damping_unit"]) == (1, 0.01, "loss")
    assert group["momentum"] == 0.5 and fixed.steps == 3 and "scheduled" not in group
    _, constant = make(curvature_update_period=7)
    _, default = make()
    default.load_state_dict(constant.state_dict())
    assert default.param_groups[0]["curvature_update_period"] == 1  # of its own schedule, at step 0
    constant.load_state_dict(make(curvature_update_period=3)[1].state_dict())
    assert constant.param_groups[0]["curvature_update_period"] == 3  # a constant is an option like any other
