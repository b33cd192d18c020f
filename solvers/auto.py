"""The default: for each leaf the exact solver that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from solvers.cholesky import Cholesky
from solvers.dense import Dense
from solvers.eigh import Eigh
from solvers.linear_operator import LinearOperator
from solvers.solver import BasisSolver


@dataclass(frozen=True)
class Auto(BasisSolver):
    """Cholesky for the inverse of a matrix, Eigh for other powers and for ``B (x) A + lam I``."""

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent`` by the solver that fits; see there for what it raises."""
        self.check_serves(op, exponent)
        return (Cholesky() if exponent == -1 else Eigh()).power(op, exponent, previous)

    def basis(self, matrix: Tensor | Dense, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors by :class:`~solvers.Eigh`."""
        return Eigh().basis(matrix, previous)
