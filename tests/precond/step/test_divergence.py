"""Which gradients are fit for a step?"""

from __future__ import annotations

import pytest
import torch

from precond.step.divergence import all_finite, largest_norm
from precond.step.divergence import squares_fit as fit


def squares_fit(gradients):
    return fit(largest_norm(gradients), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_squares_that_overflow_are_not_finite(dtype):
    size = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).max ** 0.5
    large = torch.full((2,), 1.1 * size, dtype=dtype)
    assert all_finite([large]) and not squares_fit([large])
    assert squares_fit([large / 4, torch.zeros(0), torch.ones(2, dtype=dtype)])
    for broken in (float("nan"), float("inf")):
        gradients = [torch.ones(2), torch.tensor([broken], dtype=dtype)]
        assert not all_finite(gradients) and not squares_fit(gradients)
