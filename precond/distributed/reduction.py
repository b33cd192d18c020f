"""Sums of curvature over processes, packed into one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvature.structures.weighted_mean import WeightedMean
from precond.distributed.ranks import Ranks, gathering_of
from precond.distributed.triangles import pack, packed_size, unpack


@dataclass(frozen=True)
class Item:
    """A sum that is to be added over processes.

    Attributes:
        mean: Holds the part of this process, if there is one.
        shape: Of the sum.
        dtype: Of the sum.
        symmetric: Whether it is a stack of symmetric matrices, of which the upper triangles are sent.
        column: Who gets it.
    """

    mean: WeightedMean
    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool
    column: int

    @property
    def size(self) -> int:
        """Numbers that are sent: the sum, and its weight."""
        return 1 + (packed_size(self.shape) if self.symmetric else prod(self.shape))

    def packed(self, device: torch.device) -> Tensor:
        """The part of this process as a vector."""
        if not self.mean.pending:
            return torch.zeros(self.size, dtype=self.dtype, device=device)
        total, count = self.mean.step_sum()
        numbers = pack(total) if self.symmetric else total.reshape(-1)
        return torch.cat([numbers, torch.as_tensor(count).to(numbers).reshape(1)])

    def take(self, vector: Tensor) -> None:
        """Put the sum of all processes in the place of one's own part."""
        numbers, count = vector[:-1], vector[-1]
        total = unpack(numbers, self.shape) if self.symmetric else numbers.view(self.shape).clone()
        self.mean.take(total, count.clone())


def add_up(ranks: Ranks, items: Sequence[Item]) -> None:
    """Add sums over all processes; those of other columns are forgotten here.

    One message for each dtype, in a row, and one between rows; see :class:`~precond.distributed.ranks.Ranks`. All of
    them are prepared before the first one is sent.
    """
    received: list[tuple[list[Item], Callable[[], Tensor]]] = []

    def prepare() -> None:
        for dtype in sorted({item.dtype for item in items}, key=str):
            columns = [[i for i in items if (i.dtype, i.column) == (dtype, c)] for c in range(ranks.columns)]
            empty = torch.empty(0, dtype=dtype, device=ranks.device)
            parts = [torch.cat([empty, *(item.packed(ranks.device) for item in column)]) for column in columns]
            for item in (item for column in columns for item in column):
                item.mean.discard()
            received.append((columns[ranks.column], ranks.summing(parts)))

    if items:
        ranks.together(prepare)
    for mine, send in received:
        for item, vector in zip(mine, send().split([item.size for item in mine]), strict=True):
            item.take(vector)


@dataclass(frozen=True)
class Piece:
    """A tensor that one column has and all are to get.

    Attributes:
        column: Who has it.
        shape: Its shape.
        dtype: Its dtype.
        tensor: It itself, in that column.
    """

    column: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None


def spread(ranks: Ranks, make: Callable[[], Sequence[Piece]]) -> list[Tensor]:
    """Tensors of every column, on all processes, in the order of the pieces; one message for each dtype.

    Args:
        ranks: The processes.
        make: Makes the pieces; where it raises in one process, :func:`spread` does in all.
    """
    pieces: list[Piece] = []
    out: dict[int, Tensor] = {}
    received: list[tuple[list[list[tuple[int, Piece]]], Callable[[], list[Tensor]]]] = []

    def prepare() -> None:
        pieces.extend(make())
        for dtype in sorted({piece.dtype for piece in pieces}, key=str):
            columns = [
                [(n, p) for n, p in enumerate(pieces) if (p.dtype, p.column) == (dtype, c)]
                for c in range(ranks.columns)
            ]
            own = [p.tensor.reshape(-1) for _, p in columns[ranks.column] if p.tensor is not None]
            part = torch.cat([torch.empty(0, dtype=dtype, device=ranks.device), *own])
            sizes = [sum(prod(p.shape) for _, p in column) for column in columns]
            received.append((columns, gathering_of(ranks.row, part, sizes)))

    ranks.together(prepare)
    for columns, send in received:
        for column, vector in zip(columns, send(), strict=True):
            cut = vector.split([prod(p.shape) for _, p in column])
            out |= {n: x.view(p.shape) for (n, p), x in zip(column, cut, strict=True)}
    return [out[n] for n in range(len(pieces))]
