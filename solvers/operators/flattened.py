"""An operator on vectors, seen as one on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from solvers.operators.bases import Wrapper
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import instance, shape


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Flattened(Wrapper):
    """Acts on tensors of ``tensor_shape`` as ``op`` on their entries, row-major: a dense block of a layer's matrix.

    Args:
        op: Square operator on ``(n,)``.
        tensor_shape: Shape with n entries.

    Raises:
        ValueError: If ``op`` does not act on vectors of that many entries.
    """

    op: LinearOperator
    tensor_shape: Shape

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("op", self.op, LinearOperator, "a LinearOperator such as Dense(matrix)")
        shape("tensor_shape", self.tensor_shape)
        size = (prod(self.tensor_shape),)
        if self.op.in_shape != size or self.op.out_shape != size:
            raise ValueError(f"Tensors {self.tensor_shape} need an operator on vectors {size}, not {self.op!r}.")

    @property
    def in_shape(self) -> Shape:
        return tuple(self.tensor_shape)

    @property
    def out_shape(self) -> Shape:
        return tuple(self.tensor_shape)

    def wrap(self, op: LinearOperator) -> Flattened:
        """Another operator on the same tensors."""
        return Flattened(op, self.tensor_shape)

    def apply(self, x: Tensor) -> Tensor:
        return self.op.apply(x.flatten(x.ndim - len(self.tensor_shape))).reshape(x.shape)

    def adjoint(self) -> Flattened:
        return self.wrap(self.op.adjoint())

    def shift(self, lam: Scalar) -> Flattened:
        return self.wrap(self.op.shift(lam))

    def scale(self, scalar: Scalar) -> Flattened:
        return self.wrap(self.op.scale(scalar))

    def plus(self, other: LinearOperator) -> LinearOperator:
        return self.wrap(self.op + other.op) if isinstance(other, Flattened) else super().plus(other)

    def compose(self, other: LinearOperator) -> LinearOperator:
        return self.wrap(self.op @ other.op) if isinstance(other, Flattened) else super().compose(other)

    def to_dense(self) -> Tensor:
        return self.op.to_dense()

    def diagonal(self) -> Tensor:
        return self.op.diagonal().reshape(self.tensor_shape)

    def trace(self) -> Tensor:
        return self.op.trace()

    def logdet(self) -> Tensor:
        return self.op.logdet()

    def frobenius_norm(self) -> Tensor:
        return self.op.frobenius_norm()

    def __repr__(self) -> str:
        return f"Flattened({self.op!r})"
