"""Every operator honours the contract."""

from __future__ import annotations

import torch
from torch import Tensor

import solvers
from solvers import BlockDiagonal, Dense, Diagonal, Eigen, Function, Kronecker, LinearOperator, Segment, Shifted
from solvers.direct.cholesky import CholeskyInverse
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import OperatorContract
from tests.solvers.problems import normal, positive, symmetric

ALL = ("diagonal", "trace", "logdet", "frobenius_norm")


class TestDense(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Dense(positive(4))

    def matrix(self) -> Tensor:
        return positive(4)


class TestDenseRectangle(OperatorContract):
    exact = ("frobenius_norm",)

    def operator(self) -> LinearOperator:
        return Dense(normal(3, 5))

    def matrix(self) -> Tensor:
        return normal(3, 5)

    def test_scalars_are_exact_or_refused(self, name: str = "frobenius_norm") -> None:
        torch.testing.assert_close(self.operator().frobenius_norm(), self.matrix().square().sum().sqrt())


class TestDenseStack(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Dense(positive(3, 2, 2))

    def matrix(self) -> Tensor:
        return reference.block_diagonal(*positive(3, 2, 2).reshape(4, 3, 3))


class TestOneByOne(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Kronecker(torch.full((1, 1), 2.0, dtype=torch.float64))

    def matrix(self) -> Tensor:
        return torch.full((1, 1), 2.0, dtype=torch.float64)


class TestDiagonal(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Diagonal(normal(2, 3).square() + 0.1)

    def matrix(self) -> Tensor:
        return (normal(2, 3).square() + 0.1).flatten().diag()


class TestIdentity(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return solvers.identity((4,), torch.float64)

    def matrix(self) -> Tensor:
        return torch.eye(4, dtype=torch.float64)


class TestKronecker(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Kronecker(positive(4), positive(3, seed=1))

    def matrix(self) -> Tensor:
        return reference.kron(positive(4), positive(3, seed=1))


class TestKroneckerOfThree(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        values = normal(3, seed=1).square() + 0.1
        return Kronecker(positive(2), Diagonal(values), Eigen(*_eigen(4)))

    def matrix(self) -> Tensor:
        values = normal(3, seed=1).square() + 0.1
        return reference.kron(positive(2), values.diag(), positive(4, seed=3))


class TestKroneckerRectangle(OperatorContract):
    exact = ("frobenius_norm",)

    def operator(self) -> LinearOperator:
        return Kronecker(normal(2, 3), normal(4, 2, seed=1))

    def matrix(self) -> Tensor:
        return reference.kron(normal(2, 3), normal(4, 2, seed=1))

    def test_scalars_are_exact_or_refused(self, name: str = "frobenius_norm") -> None:
        torch.testing.assert_close(self.operator().frobenius_norm(), self.matrix().square().sum().sqrt())


class TestKroneckerStack(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Kronecker(positive(2, 3), Diagonal(normal(3, 4).square() + 0.1), positive(2, 3, seed=2))

    def matrix(self) -> Tensor:
        values = normal(3, 4).square() + 0.1
        first, last = positive(2, 3), positive(2, 3, seed=2)
        return reference.block_diagonal(*(reference.kron(first[g], values[g].diag(), last[g]) for g in range(3)))


class TestEigen(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Eigen(*_eigen(4))

    def matrix(self) -> Tensor:
        return positive(4, seed=3)


class TestEigenKronecker(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        values = normal(3, 2).square() + 0.1
        return Eigen(Kronecker(_orthogonal(3), solvers.identity((2,), torch.float64)), values)

    def matrix(self) -> Tensor:
        values = normal(3, 2).square() + 0.1
        q = reference.kron(_orthogonal(3), torch.eye(2, dtype=torch.float64))
        return q @ values.flatten().diag() @ q.mT


class TestBlockDiagonal(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        blocks = [Kronecker(positive(2), positive(3)), Diagonal(normal(2, 2).square() + 1), Dense(positive(3, seed=4))]
        return BlockDiagonal(blocks, [Segment(3, (2, 3)), Segment(9, (2, 2)), Segment(0, (3,))], 13)

    def matrix(self) -> Tensor:
        diagonal = (normal(2, 2).square() + 1).flatten().diag()
        return reference.block_diagonal(positive(3, seed=4), reference.kron(positive(2), positive(3)), diagonal)


class TestShiftedDense(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Shifted(Dense(positive(4)), 0.3)

    def matrix(self) -> Tensor:
        return positive(4) + 0.3 * torch.eye(4, dtype=torch.float64)


class TestShiftedKronecker(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return Kronecker(positive(2), positive(3)).shift(torch.tensor(0.3, dtype=torch.float64))

    def matrix(self) -> Tensor:
        return reference.kron(positive(2), positive(3)) + 0.3 * torch.eye(6, dtype=torch.float64)


class TestCholeskyInverse(OperatorContract):
    exact = ALL

    def operator(self) -> LinearOperator:
        return CholeskyInverse(torch.linalg.cholesky(positive(3, 2)))

    def matrix(self) -> Tensor:
        return reference.block_diagonal(*(reference.power(m, -1) for m in positive(3, 2)))


class TestFunction(OperatorContract):
    storable = False

    def operator(self) -> LinearOperator:
        a = normal(6, 4)
        return Function(
            lambda x: (x.reshape(*x.shape[:-2], 4) @ a.mT).reshape(*x.shape[:-2], 6),
            (2, 2),
            (6,),
            rmatvec=lambda y: (y @ a).reshape(*y.shape[:-1], 2, 2),
            dtype=torch.float64,
        )

    def matrix(self) -> Tensor:
        return normal(6, 4)


class TestFunctionOneByOne(OperatorContract):
    storable = False

    def operator(self) -> LinearOperator:
        a = symmetric(4)
        return Function(lambda x: a @ x, (4,), symmetric=True, dtype=torch.float64, batched=False)

    def matrix(self) -> Tensor:
        return symmetric(4)


class TestSum(OperatorContract):
    exact = ("diagonal", "trace")

    def operator(self) -> LinearOperator:
        return Kronecker(positive(2), positive(3)) + Kronecker(positive(2, seed=1), positive(3, seed=2))

    def matrix(self) -> Tensor:
        return reference.kron(positive(2), positive(3)) + reference.kron(positive(2, seed=1), positive(3, seed=2))


class TestScaled(OperatorContract):
    storable = False

    def operator(self) -> LinearOperator:
        a = symmetric(4)
        return 2.5 * Function(lambda x: x @ a, (4,), symmetric=True, dtype=torch.float64)

    def matrix(self) -> Tensor:
        return 2.5 * symmetric(4)


class TestProduct(OperatorContract):
    def operator(self) -> LinearOperator:
        return Kronecker(positive(2), positive(3)) @ Diagonal(normal(2, 3))

    def matrix(self) -> Tensor:
        return reference.kron(positive(2), positive(3)) @ normal(2, 3).flatten().diag()


class TestSubmatrix(OperatorContract):
    exact = ("diagonal", "trace")
    storable = False

    def operator(self) -> LinearOperator:
        return Kronecker(positive(2), positive(3)).submatrix(torch.tensor([4, 0, 3]))

    def matrix(self) -> Tensor:
        index = torch.tensor([4, 0, 3])
        return reference.kron(positive(2), positive(3))[index][:, index]


def _orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=8))[0]


def _eigen(n: int) -> tuple[Dense, Tensor]:
    values, vectors = torch.linalg.eigh(positive(n, seed=3))
    return Dense(vectors), values
