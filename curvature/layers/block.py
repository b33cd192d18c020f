"""A block: parameters that share one piece of curvature, viewed as one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from solvers import storable


@storable(name="Part")
@dataclass(frozen=True)
class BlockPart:
    """A contiguous segment of one parameter and its place among a block's columns.

    The segment ``flat(parameter)[start : start + prod(split)]`` is reshaped to ``split``, permuted by ``permutation``
    and reshaped to ``shape``, whose last dimension is the one along which the parts of a block are joined.
    """

    name: str
    start: int
    split: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, ...]

    # Blocks are read and written in every step, so the facts about their shapes are computed once.

    @cached_property
    def numel(self) -> int:
        """Number of parameters in the segment."""
        return math.prod(self.split)

    @cached_property
    def in_order(self) -> bool:
        """Whether the segment keeps its order."""
        return self.permutation == tuple(range(len(self.permutation)))

    def covers(self, parameter: Tensor) -> bool:
        """Whether the segment is the whole parameter, in its order."""
        return self.in_order and self.numel == parameter.numel()

    def of(self, parameter: Tensor) -> Tensor:
        """The segment of a tensor of the parameter's shape, in block form."""
        if self.covers(parameter):
            return parameter if parameter.shape == self.shape else parameter.reshape(self.shape)
        return self.read(parameter.reshape(-1))

    def read(self, parameter: Tensor) -> Tensor:
        """The segment in block form; ``parameter`` is ``(*batch, *parameter_shape)`` flattened to ``(*batch, n)``."""
        batch = parameter.shape[:-1]
        segment = parameter
        if parameter.shape[-1] != self.numel:
            segment = parameter[..., self.start : self.start + self.numel]
        if self.in_order:
            return segment.reshape(*batch, *self.shape)
        segment = segment.reshape(*batch, *self.split)
        order = (*range(len(batch)), *(len(batch) + p for p in self.permutation))
        return segment.permute(order).reshape(*batch, *self.shape)

    def write(self, value: Tensor, parameter: Tensor) -> None:
        """Write ``value (*batch, *shape)`` back into the flat ``parameter (*batch, n)``, in place."""
        batch = parameter.shape[:-1]
        segment = parameter
        if parameter.shape[-1] != self.numel:
            segment = parameter[..., self.start : self.start + self.numel]
        if self.in_order:
            segment.view(*batch, *self.shape).copy_(value)
            return
        order = (*range(len(batch)), *(len(batch) + p for p in self.permutation))
        target = segment.view(*batch, *self.split).permute(order)
        target.copy_(value.reshape(target.shape))


@storable
@dataclass(frozen=True)
class Block:
    """Parameters preconditioned together, as one tensor of shape :attr:`shape`.

    For a layer ``y = W a + b`` the tensor is ``[W, b]``, of shape ``(d_out, d_in + 1)``; grouped layers carry a leading
    axis of groups. For scale and shift it is ``(d, 2)``. A bare parameter keeps its own shape.

    Attributes:
        name: Unique and stable: the names of the parameters, with the segment where it is not all of them.
        parts: Where each column comes from.
    """

    name: str
    parts: tuple[BlockPart, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the block tensor."""
        first = self.parts[0].shape
        if len(self.parts) == 1:
            return first
        return (*first[:-1], sum(part.shape[-1] for part in self.parts))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters the block touches."""
        return tuple(dict.fromkeys(part.name for part in self.parts))

    @cached_property
    def numel(self) -> int:
        """Number of parameters in the block."""
        return math.prod(self.shape)

    def overlaps(self, other: Block) -> bool:
        """Whether some parameter entry is in both blocks."""
        return any(
            p.name == q.name and p.start < q.start + q.numel and q.start < p.start + p.numel
            for p in self.parts
            for q in other.parts
        )

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Gather ``{name: parameter-shaped tensor}`` into the block tensor."""
        pieces = [part.of(tensors[part.name]) for part in self.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def write(self, value: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Scatter the block tensor into contiguous parameter-shaped tensors, in place."""
        for part, piece in zip(self.parts, self.split(value), strict=True):
            part.write(piece, tensors[part.name].view(-1))

    def state(self) -> dict[str, list[list[int]]]:
        """The block as names and numbers, for checkpoints: ``{name: [[start], split, permutation, shape]}``."""
        return {p.name: [[p.start], list(p.split), list(p.permutation), list(p.shape)] for p in self.parts}

    @classmethod
    def from_state(cls, name: str, saved: Mapping[str, list[list[int]]]) -> Block:
        """Restore :meth:`state`."""
        return cls(name, tuple(BlockPart(n, s[0], tuple(a), tuple(b), tuple(c)) for n, (s, a, b, c) in saved.items()))

    def split(self, value: Tensor) -> list[Tensor]:
        """Cut ``(*batch, *shape)`` into the parts' pieces."""
        if len(self.parts) == 1:
            return [value]
        return list(value.split_with_sizes([part.shape[-1] for part in self.parts], dim=-1))


@storable(name="Place")
@dataclass(frozen=True)
class BlockPlace:
    """A block's place in the flat parameter vector (the ``places`` of :class:`solvers.BlockDiagonal`)."""

    block: Block
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, block: Block, starts: Mapping[str, int], sizes: Mapping[str, int]) -> BlockPlace:
        """Place of ``block`` where parameter ``name`` starts at ``starts[name]``."""
        return cls(block, tuple(starts[p.name] for p in block.parts), tuple(sizes[p.name] for p in block.parts))

    @property
    def name(self) -> str:
        """Name of the block, for messages."""
        return self.block.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the gathered tensor."""
        return self.block.shape

    def gather(self, vector: Tensor) -> Tensor:
        """``(*batch, size)`` to ``(*batch, *block.shape)``."""
        pieces = [
            part.read(vector[..., start : start + size])
            for part, start, size in zip(self.block.parts, self.starts, self.sizes, strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def scatter(self, value: Tensor, out: Tensor) -> None:
        """Write ``(*batch, *block.shape)`` into ``out (*batch, size)``, in place."""
        pieces = self.block.split(value)
        for part, piece, start, size in zip(self.block.parts, pieces, self.starts, self.sizes, strict=True):
            part.write(piece, out[..., start : start + size])
