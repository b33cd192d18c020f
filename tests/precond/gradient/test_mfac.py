"""Is M-FAC the damped inverse of the window's second moment, on the whole model?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from precond import MFAC
from tests.precond import references as ref

DAMPING, LR = 0.05, 0.02


def by_the_book(theta: np.ndarray, gradients: list[np.ndarray], window: int) -> Iterator[np.ndarray]:
    for t, g in enumerate(gradients, 1):
        kept = gradients[max(0, t - window) : t]
        F = sum(np.outer(h, h) for h in kept) / len(kept) + DAMPING * np.eye(len(g))
        theta = theta - LR * np.linalg.inv(F) @ g
        yield theta


def trajectory(make: Any, steps: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Flat values (before the first step and after each) and flat gradients."""
    values, gradients = ref.run(make, steps)
    rows = [np.stack([x.reshape(-1) if x.ndim else x.reshape(1) for x in series]) for series in values.values()]
    slopes = [np.stack([x.reshape(-1) for x in series]) for series in gradients.values()]
    return np.concatenate(rows, 1), np.concatenate(slopes, 1)


@pytest.mark.parametrize("window", [1, 5, 50])
def test_twenty_steps_are_those_of_the_dense_inverse(window: int) -> None:
    values, gradients = trajectory(
        lambda model: MFAC(model.parameters(), LR, window=window, damping=DAMPING, momentum=0.0)
    )
    expected = list(by_the_book(values[0], list(gradients), window))
    assert np.abs(values[1:] - expected).max() < 1e-10
    assert np.abs(values[-1] - values[0]).max() > 1e-2


def test_groups_are_blocks() -> None:
    def make(model: nn.Module) -> MFAC:
        params = list(model.parameters())
        groups = [{"params": params[:3]}, {"params": params[3:], "window": 4}]
        return MFAC(groups, LR, window=7, damping=DAMPING, momentum=0.0)

    values, gradients = trajectory(make)
    split = sum(p.numel() for p in list(ref.SmallModel().parameters())[:3])
    for block, window in ((slice(0, split), 7), (slice(split, None), 4)):
        expected = list(by_the_book(values[0, block], list(gradients[:, block]), window))
        assert np.abs(values[1:, block] - expected).max() < 1e-10


def test_huge_damping_leaves_the_gradient_divided_by_it() -> None:
    values, gradients = trajectory(lambda model: MFAC(model.parameters(), 1e11, damping=1e12, momentum=0.0), steps=4)
    np.testing.assert_allclose(np.diff(values, axis=0), -0.1 * gradients, rtol=1e-6, atol=1e-12)


def test_a_parameter_without_gradient_counts_as_zero_and_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = MFAC([p, q], lr=1.0, window=4, damping=0.5, momentum=0.0)
    draws = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    draws[1, 3:] = 0
    for step, g in enumerate(draws):
        p.grad, q.grad = g[:3].clone(), None if step == 1 else g[3:].clone()
        before = torch.cat([p.detach(), q.detach()])
        optimizer.step()
        F = draws[: step + 1].T @ draws[: step + 1] / (step + 1) + 0.5 * torch.eye(6).double()
        expected = before - torch.linalg.inv(F) @ g
        if step == 1:
            expected[3:] = before[3:]
        torch.testing.assert_close(torch.cat([p.detach(), q.detach()]), expected)


def test_refusals() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"damping must be positive: a window of gradients is singular. Got 0.0"):
        MFAC([p], damping=0.0)
    with pytest.raises(ValueError, match=r"window must be a whole number of steps, at least 1, got 0"):
        MFAC([p], window=0)
