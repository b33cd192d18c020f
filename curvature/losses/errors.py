"""Errors about a loss, its outputs or its targets."""

from __future__ import annotations


class UnknownLossError(TypeError):
    """The loss function's type is not registered."""


class AmbiguousClassAxisError(ValueError):
    """The shapes of output and target allow more than one class axis."""


class NoCurvatureError(ValueError):
    """The loss has no positive semi-definite Hessian with respect to the model's output."""


class NoLikelihoodError(NoCurvatureError):
    """The loss is no negative log-likelihood, so the model's outputs have no Fisher information under it."""


class NonFiniteCurvatureError(ArithmeticError):
    """The loss is finite, but its derivatives are infinite or not numbers."""


class NonFiniteLossError(ArithmeticError):
    """The value of the loss is infinite or not a number."""


#: The option that does without derivatives, as each door names it.
EMPIRICAL = "kind='empirical' (in optimizers fisher='empirical')"
