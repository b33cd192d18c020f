"""The contract of estimates of the inverse, which are applied as they are."""

from __future__ import annotations

from abc import abstractmethod

from curvature.structures.estimator import CurvatureEstimator
from solvers import LinearOperator


class InverseEstimator(CurvatureEstimator):
    r"""An estimate of :math:`(C + \lambda I)^{-1}` itself, learned step by step or solved in a sketch.

    A step calls :meth:`update` and :meth:`commit` as for any estimate, then :meth:`improve`. :meth:`operator` is the
    current inverse, to be applied as it is, without further damping or inversion.
    """

    @abstractmethod
    def improve(self, damping: float) -> None:
        r"""Bring the inverse up to the committed step.

        Args:
            damping: Shift :math:`\lambda`, in units of C.
        """

    @abstractmethod
    def operator(self) -> LinearOperator:
        """The current inverse, acting on tensors of the block's shape."""
