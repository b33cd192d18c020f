"""Block-diagonal operators on the flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.operators.bases import Derived
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import all_of, instance, shape, whole


class Place(Protocol):
    """The entries of a block's tensor in the flat vector and their order; no arithmetic.

    A place may have a ``name``, which errors about its block then give.
    """

    def gather(self, x: Tensor) -> Tensor:
        """Read ``(*batch, size)`` as ``(*batch, *in_shape)`` of the block."""
        ...

    def scatter(self, y: Tensor, out: Tensor) -> None:
        """Write ``y (*batch, *in_shape)`` into its entries of ``out (*batch, size)``, in place."""
        ...


def _operator(name: str, value: Any) -> Any:
    return instance(name, value, LinearOperator, "a LinearOperator such as Dense(matrix)")


def _place(name: str, value: Any) -> Any:
    if not (hasattr(value, "gather") and hasattr(value, "scatter")) or isinstance(value, Tensor):
        raise TypeError(f"{name} is a place such as Segment(0, (3,)), not {value!r}.")
    return value


@storable
@dataclass(frozen=True)
class Segment:
    """``prod(shape)`` consecutive entries from ``start``, row-major."""

    start: int
    shape: Shape

    def __post_init__(self) -> None:
        """Validate the arguments."""
        whole("start", self.start, low=0)
        object.__setattr__(self, "shape", shape("shape", self.shape))

    def gather(self, x: Tensor) -> Tensor:
        """Read the segment of ``x (*batch, size)`` as ``(*batch, *shape)``."""
        return x.narrow(-1, self.start, prod(self.shape)).reshape(*x.shape[:-1], *self.shape)

    def scatter(self, y: Tensor, out: Tensor) -> None:
        """Write ``y (*batch, *shape)`` into the segment of ``out (*batch, size)``."""
        out.narrow(-1, self.start, prod(self.shape)).copy_(y.reshape(*out.shape[:-1], prod(self.shape)))


@storable
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Derived):
    """Square blocks that share out the entries of a flat vector ``(size,)``.

    Args:
        blocks: Square operators.
        places: Where each block's tensor lies, as many as blocks.
        size: Length of the flat vector.

    Raises:
        ValueError: If the blocks do not cover the vector, counted in entries, or a block is not square.
    """

    blocks: Sequence[LinearOperator]
    places: Sequence[Place]
    size: int

    def __post_init__(self) -> None:
        """Validate the arguments."""
        object.__setattr__(self, "blocks", all_of("blocks", self.blocks, _operator))
        object.__setattr__(self, "places", all_of("places", self.places, _place))
        whole("size", self.size, low=0)
        if not self.blocks or len(self.blocks) != len(self.places):
            raise ValueError(
                f"{len(self.blocks)} blocks need as many places, not {len(self.places)}, and at least one."
            )
        for index, block in enumerate(self.blocks):
            if block.in_shape != block.out_shape:
                raise ValueError(f"Block {index}, {block!r}, is not square.")
        if len({block.dtype for block in self.blocks}) != 1:
            raise ValueError(f"The blocks need one dtype, not {sorted({str(block.dtype) for block in self.blocks})}.")
        covered = sum(block.shape[1] for block in self.blocks)
        if covered != self.size:
            raise ValueError(
                f"The blocks cover {covered} entries of a vector of {self.size}. Every entry needs a block: give the "
                "rest a Diagonal."
            )

    @property
    def in_shape(self) -> Shape:
        return (self.size,)

    @property
    def out_shape(self) -> Shape:
        return (self.size,)

    @property
    def source(self) -> LinearOperator:
        return self.blocks[0]

    @property
    def symmetric(self) -> bool:
        return all(block.symmetric for block in self.blocks)

    def apply(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block, place in zip(self.blocks, self.places, strict=True):
            place.scatter(block @ place.gather(x), out)
        return out

    def map(self, function: Callable[[LinearOperator], LinearOperator]) -> BlockDiagonal:
        """The block-diagonal operator of ``function(block)`` at the same places."""
        return BlockDiagonal(tuple(map(function, self.blocks)), self.places, self.size)

    def block_name(self, index: int) -> str:
        """Label of a block in errors: the name of its place, else its number."""
        return str(getattr(self.places[index], "name", f"block {index}"))

    def adjoint(self) -> BlockDiagonal:
        return self.map(lambda block: block.adjoint())

    def shift(self, lam: Scalar) -> BlockDiagonal:
        return self.map(lambda block: block.shift(lam))

    def scale(self, scalar: Scalar) -> BlockDiagonal:
        return self.map(lambda block: block.scale(scalar))

    def plus(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, BlockDiagonal) and other.places == self.places:
            return self._zip(other, lambda left, right: left + right)
        return super().plus(other)

    def compose(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, BlockDiagonal) and other.places == self.places:
            return self._zip(other, lambda left, right: left @ right)
        return super().compose(other)

    def _zip(
        self, other: BlockDiagonal, function: Callable[[LinearOperator, LinearOperator], LinearOperator]
    ) -> BlockDiagonal:
        blocks = tuple(map(function, self.blocks, other.blocks))
        return BlockDiagonal(blocks, self.places, self.size)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        entries = torch.arange(self.size, device=self.device)
        for block, place in zip(self.blocks, self.places, strict=True):
            index = place.gather(entries).flatten()
            dense[index.unsqueeze(1), index] = block.to_dense()
        return dense

    def diagonal(self) -> Tensor:
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for block, place in zip(self.blocks, self.places, strict=True):
            place.scatter(block.diagonal(), out)
        return out

    def trace(self) -> Tensor:
        return reduce(torch.add, (block.trace() for block in self.blocks))

    def logdet(self) -> Tensor:
        return reduce(torch.add, (block.logdet() for block in self.blocks))

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(torch.stack([block.frobenius_norm() for block in self.blocks]))

    def __repr__(self) -> str:
        return f"BlockDiagonal({len(self.blocks)} blocks, {self.size})"
