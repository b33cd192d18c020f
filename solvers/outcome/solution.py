"""The report of a solve, and the warning or error when it has not converged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from solvers.outcome.errors import NotConvergedError, NotConvergedWarning

OnFailure = Literal["warn", "raise"]


@dataclass(frozen=True, eq=False)
class SolveInfo:
    """How a solve went.

    Attributes:
        iterations: Steps taken; all right-hand sides take them together.
        residual: True norm ``|b - A x|``, recomputed at the end, for each right-hand side ``(*batch,)``. For least
            squares that of the normal equations.
        tolerance: What the norm had to reach, ``max(rtol |b|, atol)``, ``(*batch,)``.
        converged: Which right-hand sides met the stopping rule, boolean ``(*batch,)``.
        negative_curvature: Which right-hand sides met a direction ``p`` with ``p^T A p <= 0``, or None where the method
            does not look.
        direction: That direction for each of them, ``(*batch, *in_shape)``, zero for the others.
    """

    iterations: int
    residual: Tensor
    tolerance: Tensor
    converged: Tensor
    negative_curvature: Tensor | None = None
    direction: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """A solution and its report."""

    x: Tensor
    info: SolveInfo


_silenced: ContextVar[bool] = ContextVar("no warning of convergence", default=False)


@contextmanager
def silenced() -> Iterator[None]:
    """No :class:`NotConvergedWarning` inside, in this thread: for those whose result says it.

    The filters of :mod:`warnings` belong to the process.
    """
    token = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(token)


def not_converged(message: str, on_failure: OnFailure, stacklevel: int = 2) -> None:
    """Raise or warn that an iteration stopped before it reached its tolerance.

    Args:
        message: How far it came, and what to change.
        on_failure: Whether to "warn" or to "raise".
        stacklevel: Where a warning points, counted from the caller as by :func:`warnings.warn`.

    Raises:
        NotConvergedError: If ``on_failure`` is "raise".
    """
    if on_failure == "raise":
        raise NotConvergedError(message)
    if not _silenced.get():
        warnings.warn(message, NotConvergedWarning, stacklevel=stacklevel + 1)


def report(info: SolveInfo, name: str, on_failure: OnFailure) -> None:
    """Warn or raise if a right-hand side has not converged.

    Raises:
        NotConvergedError: If ``on_failure`` is "raise" and one has not.
    """
    if bool(info.converged.all()):
        return
    worst = int((info.residual - info.tolerance).flatten().argmax())
    message = (
        f"{name} has not converged for {int((~info.converged).sum())} of {info.converged.numel()} right-hand sides in "
        f"{info.iterations} steps: the residual is {float(info.residual.flatten()[worst]):.3g}, wanted "
        f"{float(info.tolerance.flatten()[worst]):.3g}. Allow more max_steps, more damping, a preconditioner, or a "
        "larger rtol."
    )
    not_converged(message, on_failure, 3)
