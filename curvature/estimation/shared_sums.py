"""Sums over a data set of which each process has a share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.model.shares import Shares
from curvature.structures.estimator import CurvatureEstimator, Form
from curvature.structures.weighted_mean import WeightedMean


def add_shares(
    shares: Shares,
    estimators: dict[str, CurvatureEstimator],
    forms: dict[str, Form],
    operations: dict[str, tuple[str, ...]],
    make: Callable[[Block, Form], CurvatureEstimator],
    reached: Collection[str],
    weight: Tensor | float,
    device: torch.device,
) -> None:
    """Add the sums of other processes; blocks that the data here did not reach count them as zero.

    Args:
        shares: The processes.
        estimators: Block -> its estimate here; those of blocks that only other processes have are added.
        forms: Block -> its form; likewise.
        operations: Block -> what it was used by; likewise.
        make: Makes an estimate.
        reached: Blocks that the data here reached.
        weight: Of the data here.
        device: Where the sums are.
    """
    described = {
        name: (e.block.state(), forms[name], operations[name], _pending(e.means())) for name, e in estimators.items()
    }
    union: dict[str, Any] = {}
    for one in shares.gather(described):
        for name, known in one.items():
            union.setdefault(name, (*known[:3], {}))[3].update(known[3])
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    places: list[WeightedMean] = []
    for name in sorted(union):
        block, form, used_by, kinds = union[name]
        if name not in estimators:
            estimators[name] = make(Block.from_state(name, block), form)
            forms[name], operations[name] = form, used_by
        means = estimators[name].means(kinds)
        for key, (shape, dtype) in kinds.items():
            if not means[key].pending:
                means[key].add(torch.zeros(shape, dtype=dtype, device=device), 0.0)
        if name not in reached:
            estimators[name].count(weight)
        for key in sorted(kinds):
            total, count = means[key].step_sum()
            totals.append(total.to(kinds[key][1]).clone())
            counts.append(torch.as_tensor(count, dtype=torch.float64, device=total.device))
            places.append(means[key])
    shares.sum(*totals)
    if counts:
        shares.sum(joined := torch.stack(counts))
        for mean, total, count in zip(places, totals, joined, strict=True):
            mean.take(total, count.to(total.dtype))


def _pending(means: Mapping[str, WeightedMean]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what waits to be committed."""
    return {
        name: (tuple(mean.step_sum()[0].shape), mean.step_sum()[0].dtype)
        for name, mean in means.items()
        if mean.pending
    }
