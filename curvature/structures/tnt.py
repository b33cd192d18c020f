"""Tensor-normal curvature (TNT): the covariance of gradients as that of a matrix-variate normal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import Outer, Samples, second_moment
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeansEstimator
from curvature.structures.kfac import largest_side, stored_in_factors
from curvature.structures.unit import unit_or_diagonal
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, Diagonal, Kronecker
from solvers.precision import widen


class TensorNormalEstimator(MeansEstimator):
    r"""``L (x) R / tr L`` from the per-sample gradients ``G (d_out, d_in)`` of a layer.

    .. math:: L = \frac{1}{total} \sum_{k,n} G_{kn} G_{kn}^\top, \qquad
        R = \frac{1}{total} \sum_{k,n} G_{kn}^\top G_{kn}

    These are the partial traces of the dense block. Both have the trace of C, and so has their Kronecker product
    divided by it. If the gradients are matrix normal, :math:`\operatorname{vec} G \sim N(0, U \otimes V)`, the
    estimate is exact: then :math:`L = U \operatorname{tr} V` and :math:`R = V \operatorname{tr} U`.

    References:
        Ren and Goldfarb (2021), "Tensor normal training for deep learning models", https://arxiv.org/abs/2106.02925
    """

    structure: ClassVar[str] = "tensor normal"

    names = ("L", "R")
    L: WeightedMean
    R: WeightedMean

    def __init__(self, block: Block, max_dim: int = 16384) -> None:
        super().__init__(block)
        self.max_dim = max_dim

    def matrix_axes(self, name: str) -> int | None:
        return len(self.block.shape)

    def totals(self, samples: Samples) -> Iterator[dict[str, Tensor]]:
        for left, right in _pairs(samples):
            yield {"L": second_moment(left, self.max_dim), "R": second_moment(right, self.max_dim)}

    @property
    def stored(self) -> int:
        return stored_in_factors(self.block, self.max_dim)

    def of_means(self, means: Mapping[str, Tensor]) -> Kronecker:
        left, right = means["L"], means["R"]
        stack = len(self.block.shape) - 2
        diagonal = left.diagonal(dim1=-2, dim2=-1) if left.dim() == stack + 2 else left
        trace = diagonal.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
        return Kronecker(
            *(
                Dense(value / scale.unsqueeze(-1), is_gram=True)
                if value.dim() == stack + 2
                else Diagonal(value / scale)
                for value, scale in ((left, torch.ones_like(trace)), (right, trace))
            )
        )


def _pairs(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Rows ``(*, m, d_out)`` and ``(*, m', d_in)`` whose second moments sum to L and R.

    The gradient of one position is :math:`g a^\top`, with :math:`G G^\top = |a|^2 g g^\top` and
    :math:`G^\top G = |g|^2 a a^\top`; others are formed, and their columns and rows taken.
    """
    uses = samples.aligned()
    if len(uses) == 1 and isinstance(use := uses[0], Outer) and isinstance(use.a, Tensor) and use.positions == 1:
        g, a = widen(use.g.squeeze(-2)), widen(use.rows.squeeze(-2))  # (*, k, n, o), (*, n, i)
        outer = g * torch.linalg.vector_norm(a, dim=-1, keepdim=True).unsqueeze(-3)
        inner = a * torch.linalg.vector_norm(g, dim=(-3, -1)).unsqueeze(-1)
        pair = (outer.flatten(-3, -2), inner)
        yield pair[::-1] if use.flipped else pair
        return
    for chunk in samples.chunks():
        rows = widen(chunk).movedim(0, -3)  # (*, kn, o, i)
        yield rows.mT.flatten(-3, -2), rows.flatten(-3, -2)


@dataclass(frozen=True)
class TensorNormal(Curvature):
    """TNT: a Kronecker product per layer from the gradients themselves, not from inputs and output gradients.

    Prefer it where a layer is used at several positions, whose gradients K-FAC takes for uncorrelated or equal. Where
    an example has one position it costs what K-FAC costs; otherwise per-sample gradients are formed, a chunk at a time.
    Layers of another shape get a 2 x 2 matrix per unit (scale and shift) or a diagonal.

    Attributes:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        max_dim: Factors larger than this are kept as their diagonals.
        max_ratio: As for :class:`KroneckerFisher`.
    """

    max_dim: int = 16384
    max_ratio: float | None = 4.0

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if form != "outer":
            return unit_or_diagonal(block)
        return TensorNormalEstimator(block, largest_side(block, self.max_dim, self.max_ratio))
