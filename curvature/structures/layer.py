"""A dense matrix per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeanEstimator
from solvers import Dense, Flattened, LinearOperator
from solvers.precision import widen
from solvers.triangles import gram


class DenseEstimator(MeanEstimator):
    r"""Exact dense matrix of a block, :math:`\frac{1}{total} \sum_{k,n} g_{kn} g_{kn}^\top`, ``(p, p)``.

    Costs ``p^2`` numbers and, for each row, ``p^2`` operations.

    Raises:
        ValueError: If the block has more than ``max_size`` parameters.
    """

    structure: ClassVar[str] = "dense"

    def __init__(self, block: Block, max_size: int) -> None:
        if block.numel > max_size:
            raise ValueError(
                f"block {block.name} has {block.numel} parameters, so its dense matrix has {block.numel**2:.3g} "
                f"entries; max_size={max_size} allows {max_size**2:.3g}. Raise max_size, leave the block out with "
                "params=, or take another structure ('kfac', 'unit', 'diagonal')."
            )
        super().__init__(block)

    def matrix_axes(self, name: str) -> int | None:
        return 2

    def total(self, samples: Samples) -> Tensor:
        return samples.summed(lambda chunk: gram(widen(chunk).flatten(1)))

    def of_mean(self, value: Tensor) -> LinearOperator:
        return Flattened(Dense(value), self.block.shape)

    @property
    def stored(self) -> int:
        return self.block.numel**2


@dataclass(frozen=True)
class LayerFisher(Curvature):
    """Block-diagonal Fisher or GGN: a dense matrix for weight and bias of each layer, and for each bare parameter.

    Attributes:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        max_size: Blocks with more parameters are refused.
    """

    max_size: int = 8192

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return DenseEstimator(block, self.max_size)
