"""Checks that are read together: a hundred blocks cost one host synchronisation, and every block is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from solvers.outcome.errors import SolverError
from solvers.outcome.memory import is_out_of_memory

_Check = tuple[Tensor, Callable[[], Exception]]
_where: ContextVar[str] = ContextVar("part of the operator at work", default="")
_pending: ContextVar[list[_Check] | None] = ContextVar("pending checks", default=None)
_later: ContextVar[list[_Check] | None] = ContextVar("checks that are read later", default=None)


def require(ok: Tensor, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` unless the 0-d boolean ``ok`` holds: at once, or at the end of :func:`checked`.

    Args:
        ok: 0-d boolean tensor on any device.
        error: Builds the exception; called only on failure, so it may read values back from the device.
    """
    pending, where = _pending.get(), _where.get()
    if pending is None:
        if not bool(ok):
            raise error()
    else:
        pending.append((ok, lambda: _located(error(), where)))


@contextmanager
def working_on(part: str) -> Iterator[None]:
    """Name the part of an operator that the block of code works on; its errors start with the name."""
    where = f"{_where.get()}{part}: "
    token = _where.set(where)
    try:
        yield
    except SolverError as error:
        if str(error).startswith(where):  # a check inside has named it already
            raise
        raise _located(error, f"{part}: ") from error
    finally:
        _where.reset(token)


@contextmanager
def checked() -> Iterator[None]:
    """Gather every :func:`require` inside the block and evaluate all of them once, when the block ends.

    Raises:
        Exception: The error of the first check that fails.
    """
    checks: list[_Check] = []
    later = _later.get()
    token = _pending.set(checks)
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Torch may fail on what a check has already found; the check explains it better.
        _raise_first_failure(checks)
        raise
    finally:
        _pending.reset(token)
    if later is None:
        _raise_first_failure(checks)
    else:
        later.extend(checks)


class Verdicts:
    """The checks of several pieces of work, read together when all of it is done: one host synchronisation.

    For work whose checks nobody answers on the way, as a fallback to another solver would.
    """

    def __init__(self) -> None:
        self._checks: list[tuple[str, _Check]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """A block of code whose :func:`checked` parts leave their checks for :meth:`failures`."""
        found: list[_Check] = []
        token = _later.set(found)
        try:
            yield
        finally:
            _later.reset(token)
        # Where there is nothing to wait for, what holds is forgotten, with the matrices that its error would need.
        self._checks += [(name, (ok, error)) for ok, error in found if waits(ok) or not ok.numpy()]

    def failures(self) -> dict[str, Exception]:
        """Name -> the error of its first check that fails, for those that have one."""
        if not self._checks:
            return {}
        device = self._checks[0][1][0].device
        fine = torch.stack([ok.to(device) for _, (ok, _) in self._checks])
        if bool(fine.all()):
            return {}
        out: dict[str, Exception] = {}
        for (name, (_, error)), ok in zip(self._checks, fine.tolist(), strict=True):
            if not ok and name not in out:
                out[name] = error()
        return out


def waits(ok: Tensor) -> bool:
    """Whether reading a tensor waits for a device."""
    return ok.device.type != "cpu"


def _raise_first_failure(checks: list[_Check]) -> None:
    if not checks:
        return
    device = checks[0][0].device
    verdicts = torch.stack([ok.to(device) for ok, _ in checks])
    if not bool(verdicts.all()):
        raise checks[int(verdicts.logical_not().nonzero()[0])][1]()


def _located(error: Exception, where: str) -> Exception:
    return type(error)(f"{where}{error}") if where and isinstance(error, SolverError) else error
