"""Errors of a solve; every message says what was wrong, what was expected and how to mend it."""

from __future__ import annotations


class SolverError(ValueError):
    """Base of all refusals of this package."""


class StructureError(SolverError):
    """The operator's structure does not allow the request (and going dense was not asked for)."""


class NonFiniteError(SolverError):
    """An operator holds NaN or infinity."""


class SingularMatrixError(SolverError):
    """A matrix has no (numerically meaningful) inverse."""


class NotPositiveDefiniteError(SingularMatrixError):
    """A matrix has an eigenvalue below zero, or one that rounding cannot tell from zero."""


class NotSymmetricError(SolverError):
    """A matrix differs from its transpose where a symmetric one is needed."""


class NotConvergedError(SolverError):
    """An iteration stopped before it reached its tolerance."""


class NotConvergedWarning(UserWarning):
    """An iteration stopped before it reached its tolerance, and its result is used nevertheless."""


class InexactWarning(UserWarning):
    """A result stands in for the one that was asked for, because that one could not be computed."""
