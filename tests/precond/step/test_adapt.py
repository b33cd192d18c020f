"""Does the damping follow the ratio of what the loss did to what its model promised?"""

from __future__ import annotations

import pytest
import torch

from precond.step.adapt import LevenbergMarquardt, unseen


@pytest.mark.parametrize(
    "decrease, predicted, factor",
    [(1.0, 1.0, 1 / 3), (0.5, 1.0, 1), (0.2, 1.0, 3), (-1.0, 1.0, 3), (1.0, 0.0, 3), (1.0, -1.0, 3)],
)
def test_the_ratio_decides(decrease, predicted, factor):
    assert LevenbergMarquardt().judged(2.0, decrease, predicted) == pytest.approx(2 * factor)


def test_the_mean_eigenvalue_bounds_the_damping_from_below():
    rule = LevenbergMarquardt(relative_minimum=0.1)
    assert rule.judged(2.0, 1.0, 1.0, mean=10.0) == 1.0


def test_a_promise_below_the_precision_of_the_loss_is_not_judged():
    assert unseen(1e-8, 1.0, 1.0, torch.float32) and not unseen(1e-8, 1.0, 1.0, torch.float64)
    assert not unseen(1e-8, 1.0, float("inf"), torch.float32) and not unseen(-1e-8, 1.0, 1.0, torch.float32)
