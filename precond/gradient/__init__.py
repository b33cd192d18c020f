"""Optimizers that need gradients only: one file for each method."""

from precond.gradient.optimizer import GradientOptimizer

__all__ = ["GradientOptimizer"]
