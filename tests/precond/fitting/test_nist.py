"""The certified regressions of NIST, from the harder start, with one setting."""

from __future__ import annotations

import pytest
import torch

from precond import least_squares
from tests.benchmarks.nist import problems

PROBLEMS = problems()


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_certified_digits_are_found_from_the_harder_start(name):
    problem = PROBLEMS[name]
    found = least_squares(problem.residuals, problem.starts[0])
    assert problem.digits(found.x) >= 6
    assert found.success
    if name != "Lanczos1":  # its residuals are rounding errors of the data
        torch.testing.assert_close(2 * found.cost.item(), problem.sum_of_squares, rtol=1e-7, atol=0)
        assert found.covariance_valid
        torch.testing.assert_close(found.stderr, problem.deviations, rtol=1e-4, atol=0)
