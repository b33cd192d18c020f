"""Shapes of a model's parameters: where each lies in the flat vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart, BlockPlace


@dataclass(frozen=True)
class Tensors:
    """Shapes of the trainable parameters, in the order of the flat vector.

    Attributes:
        shapes: By name.
        dtype: Of the model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
        """Those of a model's parameters."""
        return cls({name: tuple(p.shape) for name, p in parameters.items()}, dtype)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of entries, by name."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def starts(self) -> dict[str, int]:
        """Start of each parameter in the flat vector, by name."""
        starts, position = {}, 0
        for name, size in self.sizes.items():
            starts[name], position = position, position + size
        return starts

    @cached_property
    def vectors(self) -> set[str]:
        """Names of the parameters with at most one dimension."""
        return {name for name, shape in self.shapes.items() if len(shape) <= 1}

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes.values())

    def place(self, part: BlockPart) -> BlockPlace:
        """Place of a part in the flat vector."""
        return BlockPlace.of(Block(part.name, (part,)), self.starts, self.sizes)
