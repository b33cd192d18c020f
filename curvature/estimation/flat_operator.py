"""The estimates of all blocks as one operator on the flat parameter vector."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart, BlockPlace
from curvature.model.parameters import Parameters
from curvature.structures.estimator import CurvatureEstimator
from solvers import BlockDiagonal, Diagonal, LinearOperator


def flat_operator(
    estimators: Collection[CurvatureEstimator], parameters: Parameters, scale: Tensor | float = 1.0
) -> BlockDiagonal:
    """All blocks, times ``scale``, on the flat parameter vector; parameters that were never used count zero.

    Args:
        estimators: One for each block.
        parameters: Those of the vector.
        scale: Factor of all blocks.
    """
    sizes = {name: p.numel() for name, p in parameters.items()}
    blocks: list[LinearOperator] = []
    places: list[BlockPlace] = []
    for estimator in sorted(estimators, key=lambda e: parameters.starts[e.block.parts[0].name]):
        operator = estimator.operator()
        blocks.append(operator if isinstance(scale, float) and scale == 1.0 else operator * scale)
        places.append(BlockPlace.of(estimator.block, parameters.starts, sizes))
    dtype = reduce(torch.promote_types, (operator.dtype for operator in blocks)) if blocks else torch.float32
    blocks = [operator.to(dtype) for operator in blocks]
    for block in _uncovered(estimators, parameters):
        zeros = torch.zeros(block.shape, dtype=dtype, device=parameters.device)
        blocks.append(Diagonal(zeros))
        places.append(BlockPlace.of(block, parameters.starts, sizes))
    return BlockDiagonal(tuple(blocks), tuple(places), parameters.size)


def _uncovered(estimators: Collection[CurvatureEstimator], parameters: Parameters) -> list[Block]:
    """Segments of parameters that belong to no block."""
    covered: dict[str, list[tuple[int, int]]] = {name: [] for name in parameters}
    for estimator in estimators:
        for part in estimator.block.parts:
            covered[part.name].append((part.start, part.start + part.numel))
    gaps = []
    for name, spans in covered.items():
        position = 0
        for start, stop in [*sorted(spans), (parameters[name].numel(),) * 2]:
            if start > position:
                n = start - position
                gaps.append(Block(f"{name}[{position}:{start}]", (BlockPart(name, position, (n,), (0,), (n,)),)))
            position = max(position, stop)
    return gaps
