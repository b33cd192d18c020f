"""Nonlinear least squares with the signature of ``scipy.optimize.least_squares``, on tensors, trees and modules."""

from precond.fitting.call import least_squares
from precond.fitting.result import LeastSquaresResult

__all__ = ["LeastSquaresResult", "least_squares"]
