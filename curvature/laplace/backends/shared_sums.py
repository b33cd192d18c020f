"""Kronecker factors of data that are shared out over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.factors.sums import OuterSums, PartSums, Sums
from curvature.layers.block import Block
from curvature.model.shares import Shares


def over_processes(kron: BlockKron, shares: Shares, device: torch.device) -> BlockKron:
    """The curvature of the data of all processes, each of which has its own batches and their number N."""
    flat: dict[Any, Tensor] = {}
    for block, sums in kron.sums.items():
        if isinstance(sums, OuterSums):
            for side, (g, a, count) in sums.sides.items():
                flat |= {(block, side, 0): g, (block, side, 1): a, (block, side, 2): torch.as_tensor(count)}
        else:
            flat |= {(block, None, i): total for i, total in enumerate(sums.totals)}
    found: dict[Block, dict[Any, list[Tensor]]] = {}
    for (block, side, _), total in shares.add_up(flat, device).items():
        found.setdefault(block, {}).setdefault(side, []).append(total)
    added: dict[Block, Sums] = {
        block: PartSums(tuple(sides[None]))
        if None in sides
        else OuterSums({s: (t[0], t[1], t[2]) for s, t in sides.items()})
        for block, sides in found.items()
    }
    numbers = shares.gather((kron.examples, kron.size))
    return BlockKron(kron.tensors, added, sum(n for n, _ in numbers), sum(size for _, size in numbers))
