"""Losses as objects: value, gradient, Hessian product, Hessian root and samples with respect to the model's output."""

from curvature.losses.autograd import AutogradLoss, loss_over_data
from curvature.losses.binary import BinaryCrossEntropy, BinaryCrossEntropyOnProbabilities
from curvature.losses.cross_entropy import CrossEntropy
from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.errors import (
    AmbiguousClassAxisError,
    NoCurvatureError,
    NoLikelihoodError,
    NonFiniteCurvatureError,
    NonFiniteLossError,
    UnknownLossError,
)
from curvature.losses.gaussian import GaussianNLL
from curvature.losses.linear import L1, NLL, KLDivergence
from curvature.losses.loss import Loss, loss_for, module_called, register_loss
from curvature.losses.poisson import PoissonNLL
from curvature.losses.robust import Huber, SmoothL1
from curvature.losses.squared_error import SquaredError
from curvature.losses.sum_of_losses import BatchDim, ClassDim, JoinedTerms, SumOfLosses, WeightedSum
from curvature.losses.terms import Layout, Terms

__all__ = [
    # the loss contract and its registry
    "Loss",
    "Terms",
    "Layout",
    "loss_for",
    "loss_over_data",
    "module_called",
    "register_loss",
    # classes
    "CrossEntropy",
    "BinaryCrossEntropy",
    "BinaryCrossEntropyOnProbabilities",
    # numbers
    "SquaredError",
    "GaussianNLL",
    "PoissonNLL",
    "Huber",
    "SmoothL1",
    # linear in the output: gradients only
    "NLL",
    "L1",
    "KLDivergence",
    # several at once
    "SumOfLosses",
    "BatchDim",
    "ClassDim",
    "WeightedSum",
    "JoinedTerms",
    # write your own
    "ElementwiseLoss",
    "AutogradLoss",
    # errors
    "AmbiguousClassAxisError",
    "NoCurvatureError",
    "NoLikelihoodError",
    "NonFiniteCurvatureError",
    "NonFiniteLossError",
    "UnknownLossError",
]
