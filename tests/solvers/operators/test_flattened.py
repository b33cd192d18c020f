"""A dense block on tensors honours the contract, and has powers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from solvers import BlockDiagonal, Dense, Eigh, Flattened, LinearOperator, Segment, from_state, power, state
from tests.solvers.contracts import OperatorContract
from tests.solvers.problems import normal, positive


class TestFlattened(OperatorContract):
    exact = ("diagonal", "trace", "logdet", "frobenius_norm")

    def operator(self) -> LinearOperator:
        return Flattened(Dense(positive(6)), (2, 3))

    def matrix(self) -> Tensor:
        return positive(6)


def test_powers_keep_the_shape() -> None:
    op, x = Flattened(Dense(positive(6)), (2, 3)), normal(2, 3)
    torch.testing.assert_close((op @ (op.inverse() @ x)), x)
    root = power(op, 0.5, Eigh())
    torch.testing.assert_close(root @ (root @ x), op @ x)
    blocks = BlockDiagonal([op], [Segment(0, (2, 3))], 6)
    v = normal(6)
    torch.testing.assert_close(blocks.inverse(damping=0.3) @ v, torch.linalg.solve(positive(6) + 0.3 * torch.eye(6), v))


def test_sums_and_products_of_flattened_stay_dense() -> None:
    op = Flattened(Dense(positive(6)), (2, 3))
    for made, expected in ((op + op, 2 * positive(6)), (op @ op, positive(6) @ positive(6))):
        assert isinstance(made, Flattened) and isinstance(made.op, Dense)
        torch.testing.assert_close(made.to_dense(), expected)
    restored = from_state(state(op))
    assert isinstance(restored, Flattened) and torch.equal(restored.to_dense(), positive(6))


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"Tensors \(2, 2\) need an operator on vectors \(4,\)"):
        Flattened(Dense(positive(6)), (2, 2))
