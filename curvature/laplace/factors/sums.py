"""Sums over batches for the curvature of a block; the order and the split of the data do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart
from curvature.layers.samples import Samples
from curvature.structures.estimator import CurvatureEstimator, Form, MeanEstimator
from curvature.structures.kfac import KroneckerEstimator, Sharing
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, Diagonal, LinearOperator
from solvers.precision import widen
from solvers.triangles import gram

Side = tuple[Tensor, Tensor, Tensor | float]
#: A part of a block, and the matrices whose Kronecker product is its curvature: one or two.
Factors = tuple[BlockPart, tuple[LinearOperator, ...]]


@dataclass(frozen=True)
class OuterSums:
    r"""Sums for a layer :math:`y_{ns} = W a_{ns} + b`.

    Attributes:
        sides: ``{side: (sum of g g^T, sum of a a^T, number of rows a)}``; a matrix that is used from both sides (an
            embedding tied to a head) has ``"straight"`` and ``"flipped"``, others only the first. Where a bias belongs
            to the block, a one is appended to a.
    """

    sides: dict[str, Side]

    @classmethod
    def read(cls, estimator: KroneckerEstimator) -> OuterSums:
        """The sums of an estimator, before averaging."""
        return cls({side: (g.step_sum()[0], *a.step_sum()) for side, (a, g) in estimator.sides.items()})

    def __add__(self, other: OuterSums) -> OuterSums:
        sides = dict(self.sides)
        for side, (g, a, count) in other.sides.items():
            if side in sides:
                old = sides[side]
                sides[side] = (old[0] + g, old[1] + a, old[2] + count)
            else:
                sides[side] = (g, a, count)
        return OuterSums(sides)

    def scaled(self, scalar: float | Tensor) -> OuterSums:
        """The curvature times a number."""
        return OuterSums({side: (scalar * g, a, count) for side, (g, a, count) in self.sides.items()})

    def factors(self, block: Block, vectors: set[str], share: float) -> list[Factors]:
        """Factors of each part: ``(B, share A)``, with A the mean of ``a a^T``; for a bias B alone.

        Args:
            block: The block.
            vectors: Names of the parameters with at most one dimension.
            share: Multiplier of the second factor.
        """
        estimator = KroneckerEstimator(block)
        for side, (g, a, count) in self.sides.items():
            estimator.sides[side] = (_mean(a, count), _mean(g, 1.0))
        rows, columns = estimator.operator().factors
        found: list[Factors] = []
        for part in block.parts:
            if part.name in vectors:  # its input is the constant one
                found.append((replace(part, shape=part.shape[:-1]), (rows,)))
            else:
                inputs = columns if len(block.parts) == 1 else _without_last(columns)
                found.append((part, (rows, inputs * share)))
        return found


@dataclass(frozen=True)
class PartSums:
    """Sums for parameters outside layers ``y = W a``.

    Attributes:
        totals: For each part of the block the exact matrix ``(p, p)``, or its diagonal ``(p,)``.
    """

    totals: tuple[Tensor, ...]

    @classmethod
    def read(cls, estimator: PartsEstimator) -> PartSums:
        """The sums of an estimator, before averaging."""
        return cls(estimator.split(estimator.mean.step_sum()[0]))

    def __add__(self, other: PartSums) -> PartSums:
        return PartSums(tuple(x + y for x, y in zip(self.totals, other.totals, strict=True)))

    def scaled(self, scalar: float | Tensor) -> PartSums:
        """The curvature times a number."""
        return PartSums(tuple(scalar * total for total in self.totals))

    def factors(self, block: Block, vectors: set[str], share: float) -> list[Factors]:
        """The matrix of each part, on its entries as a vector."""
        parts = (replace(part, shape=(part.numel,)) for part in block.parts)
        return [
            (part, (Dense(total, is_gram=True) if total.dim() == 2 else Diagonal(total),))
            for part, total in zip(parts, self.totals, strict=True)
        ]


Sums = OuterSums | PartSums


class PartsEstimator(MeanEstimator):
    """Exact matrices of the parts of a block, without the mixed entries; diagonals of parts that are too large.

    Args:
        block: The block.
        max_dense: Parts with more parameters keep their diagonal only.
    """

    structure = "dense or diagonal"

    def __init__(self, block: Block, max_dense: int) -> None:
        super().__init__(block)
        self.max_dense = max_dense

    def total(self, samples: Samples) -> Tensor:
        """All matrices, flattened and joined."""
        totals: list[Tensor] | None = None
        for chunk in samples.chunks():
            rows = [widen(piece).flatten(1) for piece in self.block.split(chunk)]
            new = [gram(r) if self._is_dense(part) else r.square().sum(0) for part, r in self._with_parts(rows)]
            totals = new if totals is None else [old.add_(t) for old, t in zip(totals, new, strict=True)]
        assert totals is not None
        return torch.cat([t.flatten() for t in totals])

    def split(self, total: Tensor) -> tuple[Tensor, ...]:
        """The matrices ``(p, p)`` and diagonals ``(p,)`` in :meth:`total`."""
        sizes = [part.numel**2 if self._is_dense(part) else part.numel for part in self.block.parts]
        pairs = self._with_parts(total.split(sizes))
        return tuple(t.reshape(part.numel, part.numel) if self._is_dense(part) else t for part, t in pairs)

    def of_mean(self, value: Tensor) -> LinearOperator:
        raise NotImplementedError(f"block {self.block.name}: its matrices are read part by part.")

    def _is_dense(self, part: BlockPart) -> bool:
        return part.numel <= self.max_dense

    def _with_parts(self, tensors: Sequence[Tensor]) -> list[tuple[BlockPart, Tensor]]:
        return list(zip(self.block.parts, tensors, strict=True))


@dataclass(frozen=True)
class SumOptions:
    """The choice of sums for a block.

    Attributes:
        sharing: ``"expand"`` or ``"reduce"``, see :class:`curvature.KroneckerFisher`.
        max_dim: Kronecker factors larger than this are kept as their diagonals.
        max_dense: Other parameters than matrices of layers get a dense matrix up to this size, else its diagonal.
    """

    sharing: Sharing = "expand"
    max_dim: int = 16384
    max_dense: int = 1024

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        """The estimator that is given the samples of a block."""
        if form == "outer":
            return KroneckerEstimator(block, self.sharing, self.max_dim)
        return PartsEstimator(block, self.max_dense)


def read(estimator: CurvatureEstimator) -> Sums:
    """The sums of an estimator made by :class:`SumOptions`."""
    if isinstance(estimator, KroneckerEstimator):
        return OuterSums.read(estimator)
    assert isinstance(estimator, PartsEstimator)
    return PartSums.read(estimator)


def _mean(total: Tensor, count: Tensor | float) -> WeightedMean:
    mean = WeightedMean()
    mean.add(total, count)
    mean.commit(0.0)
    return mean


def _without_last(columns: LinearOperator) -> LinearOperator:
    """The factor of the inputs without the one that stands for the bias."""
    if isinstance(columns, Diagonal):
        return Diagonal(columns.values[..., :-1])
    assert isinstance(columns, Dense)
    return Dense(columns.matrix[..., :-1, :-1].contiguous(), is_gram=True)
