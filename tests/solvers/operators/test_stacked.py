"""Is a stack of operators what they are one by one, and the other way round?"""

from __future__ import annotations

import pytest
import torch

from solvers import CholeskyInverse, Dense, Diagonal, Kronecker, LinearOperator
from solvers.operators.stacked import kind, longest_side, numbers, stacked, unstacked
from tests.solvers.problems import positive

MEMBERS: dict[str, list[LinearOperator]] = {
    "dense": [Dense(k * positive(3), is_gram=True) for k in (1, 2)],
    "diagonal": [Diagonal(torch.rand(2, 3, dtype=torch.float64)) for _ in range(2)],
    "kronecker": [Kronecker(Dense(k * positive(4)), Dense(positive(3))) for k in (1, 2)],
}


@pytest.mark.parametrize("form", MEMBERS)
def test_a_stack_acts_as_its_operators_and_comes_apart_into_them(form: str) -> None:
    members = MEMBERS[form]
    stack = stacked(members)
    x = torch.randn(2, *members[0].in_shape, dtype=torch.float64)
    expected = torch.stack([op @ row for op, row in zip(members, x, strict=True)])
    torch.testing.assert_close(stack @ x, expected, rtol=1e-13, atol=1e-13)
    for one, op in zip(unstacked(stack), members, strict=True):
        assert kind(one) == kind(op) and torch.equal(one.to_dense(), op.to_dense())


def test_triangles_come_apart_and_own_their_memory() -> None:
    factor = torch.linalg.cholesky(torch.stack([positive(3), 2 * positive(3)]))
    for one, triangle in zip(unstacked(CholeskyInverse(factor)), factor, strict=True):
        assert isinstance(one, CholeskyInverse) and torch.equal(one.factor, triangle)
        assert one.factor.untyped_storage().nbytes() == triangle.numel() * 8


def test_only_matrices_that_are_known_alike_to_be_symmetric_are_of_one_kind() -> None:
    assert kind(Dense(positive(3), is_gram=True)) != kind(Dense(positive(3)))
    assert kind(CholeskyInverse(positive(3))) is None


def test_sizes() -> None:
    assert [longest_side(MEMBERS[form][0]) for form in MEMBERS] == [3, 0, 4]
    assert [numbers(MEMBERS[form][0]) for form in MEMBERS] == [9, 6, 16 + 9]
