"""Losses as objects: value, gradient, Hessian product, Hessian root and samples with respect to the model's output."""

from curvature.losses.cross_entropy import CrossEntropy
from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.errors import AmbiguousClassAxisError, NoCurvatureError, NonFiniteLossError, UnknownLossError
from curvature.losses.loss import Loss, loss_for, register_loss
from curvature.losses.squared_error import SquaredError
from curvature.losses.terms import Layout, Terms

__all__ = [
    # what a loss is, and how one is found
    "Loss",
    "Terms",
    "Layout",
    "loss_for",
    "register_loss",
    # the losses
    "CrossEntropy",
    "ElementwiseLoss",
    "SquaredError",
    # what can be wrong
    "AmbiguousClassAxisError",
    "NoCurvatureError",
    "NonFiniteLossError",
    "UnknownLossError",
]
