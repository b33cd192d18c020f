"""Curvature of a model's loss: what it is, estimated in the structures that can be inverted."""

from curvature.block import Block
from curvature.diagonal import DiagonalFisher
from curvature.eigenbasis import EigenbasisFisher
from curvature.estimator import Curvature, CurvatureEstimator
from curvature.fisher import fisher
from curvature.hessian import hessian
from curvature.kronecker import KroneckerFisher

__all__ = [
    "Block",
    "Curvature",
    "CurvatureEstimator",
    "DiagonalFisher",
    "EigenbasisFisher",
    "KroneckerFisher",
    "fisher",
    "hessian",
]
