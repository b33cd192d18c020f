"""What every operator and every solver must do. A newcomer inherits a suite and defines two methods."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import solvers
from solvers import Dense, Diagonal, LinearOperator, SolverError, StructureError
from tests.solvers import dense_reference as reference
from tests.solvers.problems import normal

# One inherited test runs on many classes, which hypothesis takes for a mistake; no database replays examples across.
few = settings(max_examples=15, suppress_health_check=[HealthCheck.differing_executors])
TIGHT = 1e-11


class OperatorContract(ABC):
    """Products, adjoint, arithmetic, views and state of one operator against its matrix."""

    exact: tuple[str, ...] = ()  # exact scalars among diagonal, trace, logdet, frobenius_norm; the others are refused
    storable = True

    @abstractmethod
    def operator(self) -> LinearOperator:
        """The operator, float64; the same one at every call."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Its matrix, from the definition."""

    def close(self, op: LinearOperator, matrix: Tensor) -> None:
        torch.testing.assert_close(op.to_dense(), matrix, rtol=TIGHT, atol=TIGHT)
        x = normal(3, *op.in_shape, seed=7)
        torch.testing.assert_close(
            op @ x, reference.product(matrix, x, op.in_shape, op.out_shape), rtol=TIGHT, atol=TIGHT
        )

    def test_dense_matrix(self) -> None:
        op, matrix = self.operator(), self.matrix()
        assert op.shape == tuple(matrix.shape)
        torch.testing.assert_close(op.to_dense(), matrix, rtol=TIGHT, atol=TIGHT)

    @pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (1, 1, 1)])
    def test_product_with_batch(self, batch: tuple[int, ...]) -> None:
        op = self.operator()
        x = normal(*batch, *op.in_shape, seed=1)
        before = x.clone()
        y = op @ x
        expected = reference.product(self.matrix(), x, op.in_shape, op.out_shape)
        torch.testing.assert_close(y, expected, rtol=TIGHT, atol=TIGHT)
        assert torch.equal(x, before), "the input was written to"

    def test_product_with_strided_input(self) -> None:
        op = self.operator()
        x = normal(*op.in_shape, 4, seed=2).movedim(-1, 0)
        torch.testing.assert_close(op @ x, op @ x.contiguous(), rtol=TIGHT, atol=TIGHT)

    @few
    @given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 99))
    def test_linear(self, a: float, b: float, seed: int) -> None:
        op = self.operator()
        x, y = normal(*op.in_shape, seed=seed), normal(*op.in_shape, seed=seed + 100)
        torch.testing.assert_close(op @ (a * x + b * y), a * (op @ x) + b * (op @ y), rtol=1e-9, atol=1e-9)

    @few
    @given(seed=st.integers(0, 99))
    def test_adjoint_pairs(self, seed: int) -> None:
        op = self.operator()
        x, y = normal(*op.in_shape, seed=seed), normal(*op.out_shape, seed=seed + 100)
        torch.testing.assert_close((y * (op @ x)).sum(), ((op.adjoint() @ y) * x).sum(), rtol=1e-9, atol=1e-9)

    def test_adjoint(self) -> None:
        adjoint = self.operator().adjoint()
        assert (adjoint.in_shape, adjoint.out_shape) == (self.operator().out_shape, self.operator().in_shape)
        self.close(adjoint, self.matrix().mT)
        self.close(adjoint.adjoint(), self.matrix())

    def test_symmetric_flag_is_true_only_if_symmetric(self) -> None:
        if self.operator().symmetric:
            torch.testing.assert_close(self.matrix(), self.matrix().mT, rtol=TIGHT, atol=TIGHT)

    @pytest.mark.parametrize("scalar", [-2.5, 0.0, torch.tensor(3.0, dtype=torch.float64)])
    def test_multiples(self, scalar: float | Tensor) -> None:
        self.close(scalar * self.operator(), scalar * self.matrix())
        self.close(self.operator() * scalar, scalar * self.matrix())
        self.close(scalar * (2.0 * self.operator()), 2 * scalar * self.matrix())
        self.close(-self.operator() / 2, -self.matrix() / 2)

    def test_sums_and_products(self) -> None:
        op, matrix = self.operator(), self.matrix()
        self.close(op + op, 2 * matrix)
        self.close(op + op + op, 3 * matrix)
        self.close(op - 3 * op, -2 * matrix)
        self.close(op.adjoint() @ op, matrix.mT @ matrix)
        self.close((op @ op.adjoint()) @ op, matrix @ matrix.mT @ matrix)

    def test_sum_with_diagonal(self) -> None:
        op = self.operator()
        if op.in_shape == op.out_shape:
            values = normal(*op.in_shape, seed=4)
            self.close(op + Diagonal(values), self.matrix() + values.flatten().diag())
            self.close(Diagonal(values) + op, self.matrix() + values.flatten().diag())

    @pytest.mark.parametrize("lam", [0.7, torch.tensor(0.7, dtype=torch.float64)])
    def test_shift(self, lam: float | Tensor) -> None:
        op = self.operator()
        if op.in_shape != op.out_shape:
            with pytest.raises(ValueError, match="Only a square operator has a shift"):
                op.shift(lam)
            return
        shifted = op.shift(lam)
        identity = torch.eye(op.shape[0], dtype=torch.float64)
        self.close(shifted, self.matrix() + lam * identity)
        self.close(shifted.shift(lam), self.matrix() + 2 * lam * identity)
        self.close(3.0 * shifted, 3 * (self.matrix() + lam * identity))
        self.close(shifted.adjoint(), self.matrix().mT + lam * identity)

    def test_submatrix(self) -> None:
        rows = torch.tensor([0, self.matrix().shape[0] - 1, 0])
        columns = torch.tensor([self.matrix().shape[1] - 1, 0])
        part = self.operator().submatrix(rows, columns)
        self.close(part, self.matrix()[rows][:, columns])
        self.close(part.adjoint(), self.matrix()[rows][:, columns].mT)

    def test_scipy_view(self) -> None:
        op, matrix = self.operator().to_scipy(), self.matrix().numpy()
        x, y = normal(matrix.shape[1], 2).numpy(), normal(matrix.shape[0], 2).numpy()
        np.testing.assert_allclose(op @ x[:, 0], matrix @ x[:, 0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(op @ x, matrix @ x, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(op.rmatvec(y[:, 0]), matrix.T @ y[:, 0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(op.rmatmat(y), matrix.T @ y, rtol=1e-10, atol=1e-10)
        self.close(solvers.from_scipy(op), self.matrix())

    @pytest.mark.parametrize("name", ["diagonal", "trace", "logdet", "frobenius_norm"])
    def test_scalars_are_exact_or_refused(self, name: str) -> None:
        op, matrix = self.operator(), self.matrix()
        if name not in self.exact:
            with pytest.raises(StructureError, match=f"has no exact {name}. Use solvers.{name}"):
                getattr(op, name)()
            return
        expected = {
            "diagonal": lambda: matrix.diagonal().reshape(op.in_shape),
            "trace": lambda: matrix.diagonal().sum(),
            "logdet": lambda: torch.from_numpy(np.asarray(np.linalg.slogdet(matrix.numpy())[1])),
            "frobenius_norm": lambda: (matrix**2).sum() ** 0.5,
        }[name]()
        torch.testing.assert_close(getattr(op, name)(), expected, rtol=TIGHT, atol=TIGHT)

    def test_state_survives_a_safe_file_bit_for_bit(self) -> None:
        op = self.operator()
        if not self.storable:
            with pytest.raises(StructureError, match="cannot be stored"):
                solvers.state(op)
            return
        file = io.BytesIO()
        torch.save(solvers.state(op), file)
        file.seek(0)
        again = solvers.from_state(torch.load(file, weights_only=True))
        assert type(again) is type(op)
        assert repr(again) == repr(op)
        x = normal(2, *op.in_shape)
        assert torch.equal(again @ x, op @ x)

    def test_other_dtype(self) -> None:
        op = self.operator()
        if not self.storable:
            pytest.skip("holds a function")
        single = op.to(torch.float32)
        assert single.dtype == torch.float32
        y = single @ normal(*op.in_shape).float()
        assert y.dtype == torch.float32
        # One product of a small matrix: a few units in the last place of float32 (6e-8), times its condition.
        torch.testing.assert_close(y.double(), op @ normal(*op.in_shape), rtol=1e-4, atol=1e-4)

    def test_wrong_input_is_refused(self) -> None:
        op = self.operator()
        with pytest.raises(ValueError, match="acts on tensors of shape"):
            op @ torch.zeros(*op.in_shape[:-1], op.in_shape[-1] + 1, dtype=torch.float64)
        with pytest.raises(TypeError, match=r"torch.float64 and the tensor is torch.float32"):
            op @ torch.zeros(op.in_shape)
        with pytest.raises(ValueError, match="the left takes"):
            op @ Dense(torch.zeros(op.shape[1] + 1, 2, dtype=torch.float64))
        with pytest.raises(ValueError, match="cannot be added"):
            op + Dense(torch.zeros(op.shape[0] + 1, op.shape[1], dtype=torch.float64))
        with pytest.raises(TypeError, match="number or a 0-d tensor"):
            op * torch.ones(2)

    def test_repr_is_short(self) -> None:
        assert "\n" not in repr(self.operator()) and len(repr(self.operator())) < 120


class SolverContract(ABC):
    """Powers of the structures that a solver serves, against numpy; refusal of the rest."""

    tolerance = 1e-9

    @abstractmethod
    def solver(self) -> solvers.Solver:
        """The solver."""

    @abstractmethod
    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        """Operators that it serves, symmetric positive definite, each with its matrix."""

    def exponents(self) -> tuple[float, ...]:
        """The exponents to try."""
        served = self.solver().exponents
        return (-1, -0.5, -0.25, 0.5, 2) if served is None else served

    def test_powers(self) -> None:
        for op, matrix in self.operators():
            for exponent in self.exponents():
                result = solvers.power(op, exponent, self.solver())
                expected = reference.power(matrix, exponent)
                scale = float(expected.abs().max())
                torch.testing.assert_close(result.to_dense(), expected, rtol=0, atol=self.tolerance * scale)
                assert result.in_shape == op.in_shape

    def test_solve_of_a_batch(self) -> None:
        if -1 not in self.exponents():
            pytest.skip("no inverse")
        for op, matrix in self.operators():
            b = normal(2, 3, *op.in_shape, seed=5)
            x = solvers.solve(op, b, self.solver())
            residual = reference.product(matrix, x, op.in_shape, op.in_shape) - b
            assert float(residual.abs().max()) <= self.tolerance * float(b.abs().max()) * 10
            zero = solvers.solve(op, torch.zeros_like(b), self.solver())
            assert torch.equal(zero, torch.zeros_like(b))

    def test_inverse_undoes(self) -> None:
        if -1 not in self.exponents():
            pytest.skip("no inverse")
        for op, _ in self.operators():
            x = normal(*op.in_shape, seed=6)
            torch.testing.assert_close(op.inverse(solver=self.solver()) @ (op @ x), x, rtol=0, atol=10 * self.tolerance)

    def test_other_exponents_are_refused(self) -> None:
        if self.solver().exponents is None:
            pytest.skip("serves all")
        for op, _ in self.operators():
            with pytest.raises(StructureError, match="raises to"):
                self.solver().power(op, 0.123)

    def test_rectangles_are_refused(self) -> None:
        with pytest.raises(SolverError, match="not square"):
            solvers.power(Dense(normal(3, 2)), -1, self.solver())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_operator_is_refused_by_name(self, bad: float) -> None:
        for op, _ in self.operators():
            broken = poison(op, bad)
            if broken is None:
                continue
            with pytest.raises(SolverError, match=r"NaN|infinity|finite"):
                solvers.solve(broken, normal(*op.in_shape), self.solver())

    def test_zero_operator_is_refused(self) -> None:
        for op, _ in self.operators():
            with pytest.raises(SolverError):
                solvers.solve(0.0 * op, normal(*op.in_shape), self.solver())


def poison(op: LinearOperator, bad: float) -> LinearOperator | None:
    """The operator with one bad entry (two, to stay symmetric), where it is made of one tensor."""
    match op:
        case Dense():
            matrix = op.matrix.clone()
            matrix[..., -1, 0] = matrix[..., 0, -1] = bad
            return Dense(matrix)
        case Diagonal():
            values = op.values.clone()
            values.view(-1)[-1] = bad
            return Diagonal(values)
    return None
