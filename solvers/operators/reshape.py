"""The identity between two shapes."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from solvers.operators.bases import Free
from solvers.operators.linear_operator import Shape
from solvers.outcome.arguments import instance, shape


class Reshape(Free):
    """Reads a tensor of ``in_shape`` as one of ``out_shape``, row-major.

    Raises:
        ValueError: If the shapes hold different numbers of entries.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        in_shape, out_shape = shape("in_shape", in_shape), shape("out_shape", out_shape)
        instance("dtype", dtype, torch.dtype, "a torch.dtype")
        instance("device", device, torch.device, "a torch.device")
        if prod(in_shape) != prod(out_shape):
            raise ValueError(f"{in_shape} and {out_shape} hold different numbers of entries.")
        super().__init__(in_shape, out_shape, dtype, device)

    def apply(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.ndim - len(self.in_shape)], *self.out_shape)

    def adjoint(self) -> Reshape:
        return Reshape(self.out_shape, self.in_shape, self.dtype, self.device)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Reshape:
        return Reshape(self.in_shape, self.out_shape, dtype or self.dtype, torch.device(device or self.device))

    def __repr__(self) -> str:
        return f"Reshape({self.in_shape} -> {self.out_shape})"
