"""Try one solver, then another; and the ladder that ends with the previous inverse."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from solvers.direct.cholesky import Cholesky
from solvers.direct.eigh import Eigh
from solvers.operators.dense import Dense
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import all_of, instance, number, whole
from solvers.outcome.checks import checked
from solvers.outcome.errors import InexactWarning, SolverError
from solvers.rules import power
from solvers.solver import Solver


def _solver(name: str, value: Any) -> Any:
    return instance(name, value, Solver, "a solvers.Solver such as Cholesky()")


logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, init=False)
class Fallback(Solver):
    """The first solver that succeeds, leaf by leaf: ``Fallback(Cholesky(), Eigh())``.

    Each attempt is checked separately, with one host synchronisation. Failures are logged, and listed together if all
    fail.

    Args:
        *solvers: In order of preference.
    """

    solvers: tuple[Solver, ...]

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (LinearOperator,)

    def __init__(self, *solvers: Solver) -> None:
        """Keep the solvers."""
        if not solvers:
            raise ValueError("Fallback needs at least one solver.")
        object.__setattr__(self, "solvers", all_of("solvers", solvers, _solver))

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent`` by the first solver that serves and succeeds.

        Raises:
            SolverError: If all fail; has the class of the first failure and the messages of all.
        """
        return self._first(lambda solver: power(op, exponent, solver, previous))

    def spectral_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """``values ** exponent`` by the first solver that succeeds."""
        return self._first(lambda solver: solver.spectral_power(values, exponent, op))

    def _first(self, attempt: Callable[[Solver], T]) -> T:
        failures: list[SolverError] = []
        for solver in self.solvers:
            try:
                with checked():
                    return attempt(solver)
            except SolverError as error:
                failures.append(error)
                logger.info("%s failed: %s", solver, error)
        causes = "\n".join(f"({chr(97 + i)}) {error}" for i, error in enumerate(failures))
        raise type(failures[0])(f"No solver of {len(failures)} succeeded:\n{causes}") from failures[0]


@dataclass(frozen=True)
class InFloat64(Solver):
    """Another solver in float64, with the result in the operator's own precision (float32 at least)."""

    solver: Solver

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _solver("solver", self.solver)

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (LinearOperator,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent``, computed in float64; see the inner solver for what it raises."""
        dtype = torch.float64 if op.dtype == torch.float64 else torch.float32
        return power(op.to(torch.float64), exponent, self.solver).to(dtype)

    def spectral_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """``values ** exponent``, computed in float64."""
        return self.solver.spectral_power(values.double(), exponent, op).to(values.dtype)


@dataclass(frozen=True)
class Jitter(Solver):
    """Another solver on ``A + j I``, with the smallest j that succeeds; inexact, and warns so.

    Args:
        solver: The solver.
        attempts: How many sizes to try, each ten times the one before.
        smallest: The first j, relative to the mean of the absolute diagonal; None takes ``10 eps``.
    """

    solver: Solver
    attempts: int = 3
    smallest: float | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _solver("solver", self.solver)
        whole("attempts", self.attempts)
        number("smallest", self.smallest, low=0, open_low=True, optional=True)

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``(op + j I) ** exponent``.

        Raises:
            SolverError: The last failure.
        """
        self.check_serves(op, exponent)
        assert isinstance(op, Dense)
        smallest = 10 * torch.finfo(op.dtype).eps if self.smallest is None else self.smallest
        scale = op.diagonal().abs().mean(-1)  # (*stack,)
        failure: SolverError | None = None
        for attempt in range(self.attempts):
            relative = smallest * 10**attempt
            try:
                result = power(op.add_diagonal(relative * scale), exponent, self.solver, previous)
            except SolverError as error:
                failure = error
                continue
            warnings.warn(
                f"{op!r} ** {exponent:g} succeeded only with {relative:.1g} of its mean diagonal added. "
                "Use more damping.",
                InexactWarning,
                stacklevel=2,
            )
            return result
        assert failure is not None
        raise failure


@dataclass(frozen=True)
class Previous(Solver):
    """The earlier result, unchanged: the last rung of a ladder; inexact, and warns so."""

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (LinearOperator,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``previous``.

        Raises:
            SolverError: If ``previous`` is missing or has another shape.
        """
        if previous is None or previous.in_shape != op.in_shape:
            raise SolverError(f"There is no earlier power of {op!r} to keep.")
        warnings.warn(f"{op!r} ** {exponent:g} failed; the earlier result is kept.", InexactWarning, stacklevel=2)
        return previous

    def spectral_power(self, values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
        """Refused: an earlier spectrum is not kept."""
        raise SolverError(f"There is no earlier power of {op!r} to keep.")


def ladder(solver: Solver | None = None) -> Fallback:
    """Try ``solver`` as it is, with jitter, in float64, by clamped eigenvalues, and at last keep the previous result.

    Args:
        solver: The first choice; by default :class:`Cholesky`.
    """
    first = Cholesky() if solver is None else _solver("solver", solver)
    return Fallback(first, Jitter(first), InFloat64(first), Eigh("clamped"), Previous())
