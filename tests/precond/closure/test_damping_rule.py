"""Who adapts the damping, by which settings of a rule, and what of the spelling before 0.2?"""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

from precond import PSGD, SOAP, AdaHessian, CurveBall, GaussNewton, HessianFree, Loop, Muon, Newton, Sophia
from precond.step.adapt import LevenbergMarquardt
from tests.precond import references as ref

METHODS = (Newton, GaussNewton, HessianFree, CurveBall)


def make(method, **options):
    given = [nn.Parameter(torch.ones(1))]
    return method(given, **options) if method in (Newton, GaussNewton) else method(given, nn.MSELoss(), **options)


def usual(method):
    """The rule that a method has by itself."""
    return inspect.signature(method).parameters["damping_rule"].default


@pytest.mark.parametrize(
    "method, old, rule",
    [
        (Newton, {"adapt": True}, LevenbergMarquardt()),
        (Newton, {"adapt": False}, None),
        (Newton, {"adapt": LevenbergMarquardt(increase=2.0)}, LevenbergMarquardt(increase=2.0)),
        (GaussNewton, {"adapt": True}, usual(GaussNewton)),
        (GaussNewton, {"adapt": False}, None),
        (HessianFree, {"rule": None}, usual(HessianFree)),
        (HessianFree, {"rule": LevenbergMarquardt()}, LevenbergMarquardt()),
        (CurveBall, {"rule": None, "adapt_period": 3}, replace(usual(CurveBall), period=3)),
        (CurveBall, {"rule": LevenbergMarquardt(), "adapt_period": 3}, LevenbergMarquardt(period=3)),
    ],
)
def test_the_old_spelling_means_the_same(method, old, rule):
    with pytest.warns(DeprecationWarning, match=f"{method.__name__}: .* damping_rule="):
        optimizer = make(method, **old)
    assert optimizer.rule == rule


@pytest.mark.parametrize("method", METHODS)
def test_refuses_settings_of_a_rule_without_effect(method):
    unused = {"reject_steps": True, "relative_minimum": 0.1, "relative_maximum": 5.0, "next_batch": True}
    unused |= {"period": 2} if method in (Newton, GaussNewton) else {"attempts": 2}
    for name, value in unused.items():
        with pytest.raises(ValueError, match=rf"{method.__name__}: {name}={value!r} of its damping_rule has no effect"):
            make(method, damping_rule=LevenbergMarquardt(**{name: value}))


@pytest.mark.parametrize("method", [HessianFree, CurveBall])
def test_the_damping_changes_every_period_and_without_a_rule_never(method):
    model, loss_fn = ref.SmallModel(), nn.MSELoss()
    fixed = method(ref.SmallModel(), loss_fn, damping=0.5, damping_rule=None)
    optimizer = method(model, loss_fn, damping=0.5, damping_rule=LevenbergMarquardt(lower=-1e9, upper=-1e9, period=3))
    found = []
    for step in range(7):
        x, y = ref.batch(step)
        optimizer.step(lambda x=x, y=y: loss_fn(model(x), y))
        found.append(optimizer.param_groups[0]["damping"])
    assert found == pytest.approx([0.5 / 3] * 3 + [0.5 / 9] * 3 + [0.5 / 27])
    x, y = ref.batch(0)
    other = fixed.param_groups[0]["params"]
    fixed.step(lambda: loss_fn(sum(p.sum() for p in other) * torch.ones_like(y), y))
    assert fixed.param_groups[0]["damping"] == 0.5


def test_seeds_are_for_methods_that_draw():
    for method in (PSGD, AdaHessian, Sophia):
        assert method([nn.Parameter(torch.ones(1))], loop=Loop(seed=3)).loop.seed == 3
        with pytest.warns(DeprecationWarning, match=r"seed=3 is loop=Loop\(seed=3\) now"):
            assert method([nn.Parameter(torch.ones(1))], seed=3).loop.seed == 3
    assert make(HessianFree, loop=Loop(seed=3)).loop.seed == 3
    for method in (SOAP, Muon, Newton):
        with pytest.raises(ValueError, match=rf"{method.__name__}: loop=Loop\(seed=3\) has no effect"):
            method([nn.Parameter(torch.ones(1))], loop=Loop(seed=3))
    with pytest.raises(ValueError, match=r"SOAP: loop=Loop\(eval_mode=True\) has no effect"):
        SOAP([nn.Parameter(torch.ones(1))], loop=Loop(eval_mode=True))
