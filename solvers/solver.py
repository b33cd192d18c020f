"""The contract of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from solvers.operators.dense import Dense
from solvers.operators.dispatch import advice
from solvers.operators.eigenvalue_power import computed_power, exact_power
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.errors import StructureError


class Solver(ABC):
    """A way to invert, or to raise to a power; frozen, holds settings only.

    Attributes:
        exponents: The exponents it serves; None means any real number.
        needs: Operator types it works on itself. Other structures reach it through their parts, by the rules of
            :func:`solvers.power`.
    """

    exponents: ClassVar[tuple[float, ...] | None]
    needs: ClassVar[tuple[type[LinearOperator], ...]]

    @abstractmethod
    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent`` for one operator of the types in ``needs``.

        Args:
            op: The operator.
            exponent: One of ``exponents``.
            previous: An earlier result for a nearby operator; warm starts may use it.

        Raises:
            StructureError: If the solver does not serve the operator or the exponent.
            SolverError: If the numbers do not allow a right answer.
        """

    def spectral_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """``values ** exponent`` for a spectrum known exactly; ``op`` names it in errors.

        Raises:
            SolverError: If an eigenvalue has no such power.
        """
        return exact_power(values, exponent, op)

    def check_serves(self, op: LinearOperator, exponent: float) -> None:
        """Refuse an exponent or an operator type that the solver does not serve."""
        if self.exponents is not None and exponent not in self.exponents:
            served = ", ".join(f"{e:g}" for e in self.exponents)
            raise StructureError(f"{self} raises to {served}, not to {exponent:g}. Use Eigh() for any real exponent.")
        if not isinstance(op, self.needs):
            needed = " or ".join(kind.__name__ for kind in self.needs)
            raise StructureError(
                f"{self} needs {needed}, not {op!r}. Use an iterative solver such as CG(), which needs products only, "
                f"or Dense(op.to_dense()) or dense=True if the matrix is small.{advice('power', op)}"
            )


class BasisSolver(Solver):
    """A solver that finds eigenbases; it also serves sums that only a basis can invert."""

    @abstractmethod
    def basis(self, matrix: Tensor | Dense, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(*stack, n)`` and orthonormal eigenvectors ``(*stack, n, n)`` in columns.

        Args:
            matrix: Symmetric ``(*stack, n, n)``.
            previous: A basis of a nearby matrix, for a warm start.
        """

    def computed_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """``values ** exponent`` for eigenvalues ``(*stack, n)`` with rounding errors; ``op`` names them in errors.

        Raises:
            SolverError: If an eigenvalue has no such power, or rounding cannot tell.
        """
        return computed_power(values, exponent, op, "plain", None)
