"""Base classes of operators that take shapes, dtype and device from a tensor or from another operator."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from solvers.operators.linear_operator import LinearOperator, Shape


class Derived(LinearOperator):
    """An operator made of tensors or of other operators, with their dtype and device."""

    @property
    @abstractmethod
    def source(self) -> Tensor | LinearOperator:
        """The tensor or operator whose dtype and device this one has."""

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device


class Wrapper(Derived):
    """An operator with a field ``op``: shapes, dtype, device and symmetry are those of ``op`` unless overridden."""

    op: LinearOperator

    @property
    def source(self) -> LinearOperator:
        return self.op

    @property
    def in_shape(self) -> Shape:
        return self.op.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.op.out_shape

    @property
    def symmetric(self) -> bool:
        return self.op.symmetric


class SelfAdjoint(LinearOperator):
    """An operator that equals its adjoint, whatever its numbers."""

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def symmetric(self) -> bool:
        return True

    def adjoint(self) -> Self:
        return self


class Free(LinearOperator):
    """An operator that holds no tensors: shapes, dtype and device are arguments.

    Args:
        in_shape: Shape it acts on.
        out_shape: Shape it returns.
        dtype: Type of its input and output.
        device: Where it runs.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self._in_shape, self._out_shape, self._dtype, self._device = in_shape, out_shape, dtype, device

    @property
    def in_shape(self) -> Shape:
        return self._in_shape

    @property
    def out_shape(self) -> Shape:
        return self._out_shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device
