"""Errors about a loss, its outputs or its targets."""

from __future__ import annotations


class UnknownLossError(TypeError):
    """The loss function's type is not registered."""


class AmbiguousClassAxisError(ValueError):
    """The shapes of output and target allow more than one class axis."""


class NoCurvatureError(ValueError):
    """The loss has no positive semi-definite Hessian with respect to the model's output."""


class NonFiniteLossError(ArithmeticError):
    """The value of the loss is infinite or not a number."""
