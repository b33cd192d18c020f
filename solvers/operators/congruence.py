"""``U^T M U``: a small symmetric matrix between a root and its adjoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.operators.bases import Derived
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.low_rank import Rows
from solvers.operators.storable import storable
from solvers.outcome.arguments import instance


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Congruence(Derived):
    """``root^T core root``; powers of low rank plus shift are such an operator plus a multiple of the identity.

    Args:
        root: Operator from ``in_shape`` to ``(k,)``.
        core: Operator on ``(k,)``.

    Raises:
        ValueError: If the core does not fit the root.
    """

    root: LinearOperator
    core: LinearOperator

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("root", self.root, LinearOperator, "a LinearOperator such as Rows(tensors)")
        instance("core", self.core, LinearOperator, "a LinearOperator such as Dense(matrix)")
        if not self.core.in_shape == self.core.out_shape == self.root.out_shape:
            raise ValueError(f"The core {self.core!r} must act on {self.root.out_shape}, where {self.root!r} leads.")

    @property
    def in_shape(self) -> Shape:
        return self.root.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.root.in_shape

    @property
    def source(self) -> LinearOperator:
        return self.root

    @property
    def symmetric(self) -> bool:
        return self.core.symmetric

    def apply(self, x: Tensor) -> Tensor:
        return self.root.adjoint().apply(self.core.apply(self.root.apply(x)))

    def adjoint(self) -> Congruence:
        return Congruence(self.root, self.core.adjoint())

    def scale(self, scalar: Scalar) -> Congruence:
        return Congruence(self.root, scalar * self.core)

    def diagonal(self) -> Tensor:
        if not isinstance(self.root, Rows):
            return super().diagonal()
        columns = self.root.tensors.flatten(1).mT  # (n, k)
        return (columns * self.core.apply(columns)).sum(-1).reshape(self.in_shape)
