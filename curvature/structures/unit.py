"""Unit-wise curvature: a small dense matrix for each output unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.structures.diagonal import DiagonalEstimator
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeanEstimator
from solvers import Dense, LinearOperator
from solvers.precision import widen


class UnitEstimator(MeanEstimator):
    r"""Exact blocks of the rows of the block tensor ``(*, o, i)``, as a stack ``(*, o, i, i)``.

    For scale and shift these are the 2 x 2 matrices of :math:`(\gamma_j, \beta_j)`.
    """

    structure: ClassVar[str] = "unit"

    def matrix_axes(self, name: str) -> int | None:
        return len(self.block.shape) + 1

    def total(self, samples: Samples) -> Tensor:
        def product(chunk: Tensor) -> Tensor:
            rows = widen(chunk).movedim(0, -2)  # (*, o, kn, i)
            return rows.mT @ rows

        return samples.summed(product)

    def of_mean(self, value: Tensor) -> LinearOperator:
        return Dense(value)

    @property
    def stored(self) -> int:
        return self.block.numel * self.block.shape[-1]


def unit_or_diagonal(block: Block) -> CurvatureEstimator:
    """For blocks other than layers ``y = W a``: a 2 x 2 matrix per unit for scale and shift, or a diagonal."""
    return UnitEstimator(block) if len(block.parts) == 2 else DiagonalEstimator(block)


@dataclass(frozen=True)
class UnitFisher(Curvature):
    """A dense matrix per output unit: its incoming weights and its bias; 2 x 2 for scale and shift.

    Parameters other than rows of a layer (bare ones, those without a rule) get their diagonal.

    Attributes:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        max_size: Blocks whose matrices have more entries than the square of this are refused.
    """

    max_size: int = 8192

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if len(block.shape) < 2:
            return DiagonalEstimator(block)
        entries = block.numel * block.shape[-1]
        if entries > self.max_size**2:
            raise ValueError(
                f"the units of block {block.name}, {block.shape}, have matrices of {entries:.3g} entries; "
                f"max_size={self.max_size} allows {self.max_size**2:.3g}. Raise max_size, leave the block out with "
                "params=, or take another structure ('kfac', 'diagonal')."
            )
        return UnitEstimator(block)
