"""The default: for each leaf the exact solver that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from solvers.direct.cholesky import Cholesky
from solvers.direct.eigh import Eigh
from solvers.direct.woodbury import Woodbury
from solvers.operators.compositions import Shifted, Sum
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal
from solvers.operators.linear_operator import LinearOperator
from solvers.operators.low_rank import LowRank
from solvers.solver import BasisSolver


@dataclass(frozen=True)
class Auto(BasisSolver):
    """Cholesky for the inverse of a matrix, Woodbury for low rank plus shift, Eigh for the rest.

    Refuses operators that are known by their products alone: only the user can choose the tolerances of an iteration.
    """

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense, Shifted, Sum)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent`` by the solver that fits; see there for what it raises."""
        self.check_serves(op, exponent)
        match op:
            case Shifted(op=LowRank()) | Sum(terms=(LowRank(), Diagonal()) | (Diagonal(), LowRank())):
                return Woodbury().power(op, exponent, previous)
        return (Cholesky() if exponent == -1 else Eigh()).power(op, exponent, previous)

    def basis(self, matrix: Tensor | Dense, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors by :class:`~solvers.Eigh`."""
        return Eigh().basis(matrix, previous)
