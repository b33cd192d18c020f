"""Eigendecomposition: any real power, and the eigenbases that exact damping, EKFAC and SOAP need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from solvers.operators.decompositions import eigendecomposition
from solvers.operators.dense import Dense, require_symmetric
from solvers.operators.eigenvalue_power import MODES, Mode, computed_power
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, number
from solvers.precision import widen
from solvers.solver import BasisSolver


@dataclass(frozen=True)
class Eigh(BasisSolver):
    r"""Any real power of a symmetric matrix through its eigendecomposition, about ``9 n^3``.

    Also inverts what no factorisation can, ``B (x) A + lam I``, through the eigenbases of the factors. Works in float32
    at least: half-precision input is answered in float32.

    Args:
        mode: What to do with the eigenvalues :math:`s`: "plain" takes :math:`s^p` and refuses those without a power;
            "absolute" takes :math:`|s|^p` (saddle-free Newton); "clamped" takes :math:`\max(s, floor)^p`.
        floor: For "clamped", in units of the matrix. By default ``n eps max |s|``, the size of the rounding errors. A
            Kronecker product without shift is clamped factor by factor.

    Raises:
        ValueError: For an unknown mode, or a floor that is not positive or has no use.
    """

    mode: Mode = "plain"
    floor: float | None = None

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense,)

    def __post_init__(self) -> None:
        """Validate the arguments."""
        choice("mode", self.mode, MODES)
        number("floor", self.floor, optional=True)
        if self.floor is not None and (self.mode != "clamped" or not self.floor > 0):
            raise ValueError(f"floor is a positive number for mode='clamped', not {self.floor} for {self.mode!r}.")

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> Dense:
        """``op ** exponent`` of a Dense, block by block for a stack.

        Raises:
            StructureError: For another structure.
            SingularMatrixError: In "plain" mode, if the exponent is negative and an eigenvalue is zero up to rounding.
            NotPositiveDefiniteError: In "plain" mode, if the exponent is not an integer and an eigenvalue is negative.
            NotSymmetricError: If the matrix is not symmetric.
            NonFiniteError: If it holds NaN or infinity.
        """
        self.check_serves(op, exponent)
        assert isinstance(op, Dense)
        values, basis = self.basis(op)
        powers = self.computed_power(values, exponent, op)
        return Dense((basis * powers.unsqueeze(-2)) @ basis.mT)

    def basis(self, matrix: Tensor | Dense, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(*stack, n)``, ascending, and orthonormal eigenvectors ``(*stack, n, n)`` in columns.

        Args:
            matrix: Symmetric ``(*stack, n, n)``.
            previous: A basis of a nearby matrix; ignored by a full decomposition.

        Raises:
            NotSymmetricError: If the matrix is not symmetric.
            NonFiniteError: If it holds NaN or infinity.
            SolverError: If it cannot be decomposed; see :mod:`solvers.operators.decompositions` for what is tried.
        """
        op = matrix if isinstance(matrix, Dense) else Dense(matrix)
        require_symmetric(op)
        return eigendecomposition(widen(op.matrix))

    def computed_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """``values ** exponent`` after the mode's treatment of computed eigenvalues."""
        return computed_power(values, exponent, op, self.mode, self.floor)

    def spectral_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """``values ** exponent`` after the mode's treatment of negative values."""
        if self.mode == "absolute":
            values = values.abs()
        elif self.mode == "clamped":
            return self.computed_power(values.flatten(), exponent, op).reshape(values.shape)
        return super().spectral_power(values, exponent, op)
