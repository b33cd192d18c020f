"""Is what holds NaN or infinity told from what only overflows when it is summed?"""

from __future__ import annotations

import pytest
import torch
from torch import inf, nan

from solvers.outcome.finite import is_finite


@pytest.mark.parametrize("entries", [[nan, 1.0], [inf, 1.0], [-inf, 1.0], [inf, -inf], [nan, inf, -inf]])
def test_no_combination_hides_what_is_not_finite(entries: list[float]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(3, 7, dtype=dtype)
        x[1, : len(entries)] = torch.tensor(entries, dtype=dtype)
        assert not is_finite(x)


def test_an_overflow_of_the_sum_is_none_of_the_entries() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
        assert torch.isinf(largest.sum())
        assert is_finite(largest) and is_finite(-largest)


def test_everything_that_can_be_summed_is_answered() -> None:
    assert is_finite(torch.zeros(0, 3)) and is_finite(torch.arange(5)) and is_finite(torch.tensor([True]))
    assert is_finite(torch.ones(3, dtype=torch.complex64)) and not is_finite(torch.tensor([complex(0, inf)]))
