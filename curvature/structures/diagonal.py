"""Diagonal curvature: one number per parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeanEstimator
from solvers import Diagonal, LinearOperator


class DiagonalEstimator(MeanEstimator):
    r"""Exact diagonal of the block: :math:`\frac{1}{total} \sum_{k, n} (\sum_s g_{kns} a_{ns}^\top)^2`, entry by entry.

    Where an example has one position, no per-sample gradient is formed: the sum is ``(g^2)^T a^2``.
    """

    structure: ClassVar[str] = "diagonal"

    def total(self, samples: Samples) -> Tensor:
        return samples.square_sum()

    def of_mean(self, value: Tensor) -> LinearOperator:
        return Diagonal(value)


@dataclass(frozen=True)
class DiagonalFisher(Curvature):
    """Diagonal of the Fisher or GGN; exact for ``kind="exact"``."""

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return DiagonalEstimator(block)
