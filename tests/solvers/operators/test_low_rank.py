"""Low rank plus shift is solved in the size of the Gram matrix, and equals the dense result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    CG,
    Cholesky,
    Congruence,
    Dense,
    Diagonal,
    Eigh,
    LinearOperator,
    LowRank,
    Rows,
    SingularMatrixError,
    Woodbury,
)
from solvers.outcome.errors import StructureError
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import OperatorContract, SolverContract
from tests.solvers.problems import normal

EYE = torch.eye(6, dtype=torch.float64)


def dense() -> Tensor:
    root = normal(4, 6)
    return root.mT @ root


class TestLowRank(OperatorContract):
    exact = ("diagonal", "trace", "frobenius_norm")

    def operator(self) -> LinearOperator:
        return LowRank(normal(4, 6).reshape(4, 2, 3))

    def matrix(self) -> Tensor:
        return dense()


class TestLowRankOfOperator(OperatorContract):
    exact = ("trace", "frobenius_norm")

    def operator(self) -> LinearOperator:
        root = normal(4, 6)
        return LowRank(Dense(root), gram=root @ root.mT)

    def matrix(self) -> Tensor:
        return dense()


class TestRows(OperatorContract):
    exact = ("frobenius_norm",)

    def operator(self) -> LinearOperator:
        return Rows(normal(4, 6).reshape(4, 2, 3))

    def matrix(self) -> Tensor:
        return normal(4, 6)


class TestShiftedLowRank(OperatorContract):
    exact = ("diagonal", "trace", "frobenius_norm", "logdet")

    def operator(self) -> LinearOperator:
        return LowRank(normal(4, 6)).shift(0.3)

    def matrix(self) -> Tensor:
        return dense() + 0.3 * EYE


class TestCongruence(OperatorContract):
    exact = ("diagonal", "trace")

    def operator(self) -> LinearOperator:
        return Congruence(Rows(normal(4, 6).reshape(4, 2, 3)), Dense(normal(4, 4, seed=1)))

    def matrix(self) -> Tensor:
        return normal(4, 6).mT @ normal(4, 4, seed=1) @ normal(4, 6)


class TestWoodbury(SolverContract):
    tolerance = 1e-12

    def solver(self) -> solvers.Solver:
        return Woodbury()

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        root = normal(4, 6)
        tall = normal(9, 6)
        repeated = torch.cat([root, root])  # a singular Gram matrix
        return [
            (LowRank(root.reshape(4, 2, 3)).shift(0.3), root.mT @ root + 0.3 * EYE),
            (LowRank(tall).shift(0.3), tall.mT @ tall + 0.3 * EYE),
            (LowRank(repeated).shift(0.3), repeated.mT @ repeated + 0.3 * EYE),
            (LowRank(Dense(root), gram=root @ root.mT).shift(0.3), root.mT @ root + 0.3 * EYE),
            (2.0 * (LowRank(root).shift(0.3)), 2 * (root.mT @ root + 0.3 * EYE)),
        ]

    def test_zero_operator_is_refused(self) -> None:
        with pytest.raises(SingularMatrixError, match="shift must be positive"):
            solvers.power(LowRank(normal(4, 6)).shift(0.0), -1, Woodbury())


def test_low_rank_plus_diagonal() -> None:
    values = normal(6).square() + 0.5
    expected = reference.power(dense() + values.diag(), -1)
    for op in (LowRank(normal(4, 6)) + Diagonal(values), Diagonal(values) + LowRank(normal(4, 6))):
        torch.testing.assert_close(solvers.power(op, -1, Woodbury()).to_dense(), expected)
        torch.testing.assert_close(op.inverse().to_dense(), expected)
        with pytest.raises(StructureError, match="Woodbury serves LowRank"):
            solvers.power(op, 0.5, Woodbury())


def test_inverse_is_symmetric_has_a_diagonal_and_can_be_stored() -> None:
    root = normal(4, 6).reshape(4, 2, 3)
    for op in (LowRank(root).shift(0.3), LowRank(root) + Diagonal(normal(2, 3).square() + 0.5)):
        inverse = op.inverse()
        assert inverse.symmetric
        expected = reference.power(op.to_dense(), -1)
        torch.testing.assert_close(inverse.diagonal().flatten(), expected.diagonal())
        torch.testing.assert_close(inverse.trace(), expected.trace())
        again = solvers.from_state(solvers.state(inverse))
        assert torch.equal(again.to_dense(), inverse.to_dense())


def test_multiples_by_tensors_are_solved_too() -> None:
    scalar = torch.tensor(0.25, dtype=torch.float64)
    for exponent in (-1, -0.5):
        for op in (scalar * LowRank(normal(4, 6)), 0.25 * LowRank(normal(4, 6))):
            result = solvers.power(op.shift(0.3), exponent).to_dense()
            torch.testing.assert_close(result, reference.power(0.25 * dense() + 0.3 * EYE, exponent))
    with pytest.raises(SingularMatrixError, match="is no positive multiple"):
        (-1.0 * LowRank(normal(4, 6))).inverse(0.3)


def test_four_solvers_agree() -> None:
    op = LowRank(normal(4, 6).reshape(4, 2, 3)).shift(0.1)
    b = normal(3, 2, 3)
    woodbury = solvers.solve(op, b, Woodbury())
    by_default = op.inverse() @ b
    cg = solvers.solve(op, b, CG(rtol=1e-13))
    matrix = Dense(op.to_dense())
    cholesky = solvers.solve(matrix, b.flatten(1), Cholesky()).reshape(b.shape)
    eigh = solvers.solve(matrix, b.flatten(1), Eigh()).reshape(b.shape)
    for other in (by_default, cg, cholesky, eigh):
        torch.testing.assert_close(woodbury, other, rtol=0, atol=1e-10)


def test_sums_concatenate_roots() -> None:
    both = LowRank(normal(4, 6)) + LowRank(normal(2, 6, seed=1))
    assert isinstance(both, LowRank) and both.rank == 6
    torch.testing.assert_close(both.to_dense(), dense() + normal(2, 6, seed=1).mT @ normal(2, 6, seed=1))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"maps to \(k,\)"):
        LowRank(solvers.Kronecker(normal(2, 3), normal(4, 2)))
    with pytest.raises(ValueError, match="Gram matrix of 4 rows"):
        LowRank(normal(4, 6), gram=normal(6, 6))
    with pytest.raises(ValueError, match=r"must act on \(4,\)"):
        Congruence(Rows(normal(4, 6)), Dense(normal(3, 3)))
