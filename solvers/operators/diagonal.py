"""Diagonal matrices, and the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.operators.bases import Derived, SelfAdjoint
from solvers.operators.dense import Dense
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import device as checked_device
from solvers.outcome.arguments import instance
from solvers.outcome.arguments import shape as checked_shape
from solvers.outcome.checks import require
from solvers.outcome.errors import SingularMatrixError


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(SelfAdjoint, Derived):
    """Multiplies each entry by its own number.

    Args:
        values: The diagonal, of any shape; the operator acts on tensors of that shape.

    Raises:
        TypeError: If ``values`` is not real floating point.
    """

    values: Tensor

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("values", self.values, Tensor, "a tensor")
        if not self.values.is_floating_point():
            raise TypeError(f"Diagonal takes real floating-point values, not {self.values.dtype}.")

    @property
    def in_shape(self) -> Shape:
        return tuple(self.values.shape)

    @property
    def source(self) -> Tensor:
        return self.values

    def apply(self, x: Tensor) -> Tensor:
        return self.values * x

    def to_dense(self) -> Tensor:
        return torch.diag(self.values.flatten())

    def shift(self, lam: Scalar) -> Diagonal:
        return Diagonal(self.values + lam)

    def plus(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Diagonal) and other.dtype == self.dtype:
            return Diagonal(self.values + other.values)
        if isinstance(other, Dense) and other.dtype == self.dtype:
            return other.add_diagonal(self.values)
        return super().plus(other)

    def scale(self, scalar: Scalar) -> Diagonal:
        return Diagonal(scalar * self.values)

    def compose(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Diagonal) and other.dtype == self.dtype:
            return Diagonal(self.values * other.values)
        return super().compose(other)

    def diagonal(self) -> Tensor:
        return self.values

    def logdet(self) -> Tensor:
        require((self.values > 0).all(), lambda: SingularMatrixError(f"{self!r} has an entry that is not positive."))
        return self.values.log().sum()

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.values)

    def __repr__(self) -> str:
        return f"Diagonal({'x'.join(map(str, self.in_shape))})"


def identity(shape: Shape, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Diagonal:
    """The identity on tensors of ``shape``."""
    instance("dtype", dtype, torch.dtype, "a torch.dtype", optional=True)
    device = checked_device("device", device, optional=True)
    return Diagonal(torch.ones(checked_shape("shape", shape), dtype=dtype, device=device))
