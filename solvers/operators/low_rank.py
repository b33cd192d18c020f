"""Low-rank operators by their root: ``C = U^T U``, as per-sample gradients give it.

Axis letters: k rows of the root, n entries of ``in_shape``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.operators.bases import Derived, SelfAdjoint
from solvers.operators.dense import Dense
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import flag, instance, real_tensor


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Rows(Derived):
    """A stack of k tensors as a map: inner products with each of them, or (``transposed``) their combinations.

    Args:
        tensors: ``(k, *shape)``.
        transposed: False maps ``shape`` to ``(k,)``, True maps ``(k,)`` to ``shape``.
    """

    tensors: Tensor
    transposed: bool = False

    def __post_init__(self) -> None:
        """Validate the arguments."""
        real_tensor("tensors", self.tensors)
        flag("transposed", self.transposed)
        if self.tensors.ndim < 1:
            raise ValueError("tensors is a stack (k, *shape), not a single number.")

    @property
    def in_shape(self) -> Shape:
        return (self.tensors.shape[0],) if self.transposed else tuple(self.tensors.shape[1:])

    @property
    def out_shape(self) -> Shape:
        return self.adjoint().in_shape

    @property
    def source(self) -> Tensor:
        return self.tensors

    def apply(self, x: Tensor) -> Tensor:
        count = self.tensors.shape[0]
        flat = self.tensors.reshape(count, -1)  # (k, n)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        if self.transposed:
            return (x @ flat).reshape(*batch, *self.out_shape)
        return x.reshape(*batch, flat.shape[1]) @ flat.mT

    def adjoint(self) -> Rows:
        return Rows(self.tensors, not self.transposed)

    def scale(self, scalar: Scalar) -> Rows:
        return Rows(scalar * self.tensors, self.transposed)

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.tensors)


@storable
@dataclass(frozen=True, eq=False, repr=False)
class LowRank(SelfAdjoint, Derived):
    r""":math:`U^\top U` from a root U of k rows; positive semi-definite of rank at most k.

    Products cost ``O(k n)``. With a shift, :class:`~solvers.Woodbury` needs only the k x k Gram matrix
    :math:`U U^\top`, which often comes cheaper than from U: for per-sample gradients of a linear layer it is
    ``(a a^T) * (g g^T)``, and then the root may be an operator that never forms the gradients.

    Args:
        root: ``(k, *in_shape)``, or an operator from ``in_shape`` to ``(k,)``.
        gram: :math:`U U^\top (k, k)` if it is known; formed by products with the root when needed if left out.

    Raises:
        ValueError: If the root operator does not map to ``(k,)``, or the Gram matrix is not ``(k, k)``.
    """

    root: Tensor | LinearOperator
    gram: Tensor | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("root", self.root, (Tensor, LinearOperator), "a tensor (k, *in_shape) or a LinearOperator")
        real_tensor("gram", self.gram, optional=True)
        if isinstance(self.root, Tensor) and self.root.ndim == 0:
            raise ValueError("The root of LowRank is a tensor (k, *in_shape), not 0-d.")
        out_shape = self.factor.out_shape
        if len(out_shape) != 1:
            raise ValueError(f"The root of LowRank maps to (k,), not to {out_shape}.")
        if self.gram is not None and tuple(self.gram.shape) != 2 * out_shape:
            raise ValueError(f"The Gram matrix of {out_shape[0]} rows is square of that size, not {self.gram.shape}.")

    @property
    def factor(self) -> LinearOperator:
        """The root as an operator from ``in_shape`` to ``(k,)``."""
        return Rows(self.root) if isinstance(self.root, Tensor) else self.root

    @property
    def in_shape(self) -> Shape:
        return self.factor.in_shape

    @property
    def source(self) -> LinearOperator:
        return self.factor

    @property
    def rank(self) -> int:
        """Number of rows k of the root, an upper bound of the rank."""
        return self.factor.out_shape[0]

    def gram_matrix(self) -> Tensor:
        """:math:`U U^T (k, k)`."""
        return (self.factor @ self.factor.adjoint()).to_dense() if self.gram is None else self.gram

    def apply(self, x: Tensor) -> Tensor:
        return self.factor.adjoint().apply(self.factor.apply(x))

    def plus(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, LowRank) and isinstance(self.root, Tensor) and isinstance(other.root, Tensor):
            return LowRank(torch.cat([self.root, other.root]))
        return super().plus(other)

    def scale(self, scalar: Scalar) -> LinearOperator:
        if isinstance(scalar, Tensor) or scalar < 0:
            return super().scale(scalar)
        gram = None if self.gram is None else scalar * self.gram
        return LowRank(self.root * scalar**0.5, gram)

    def diagonal(self) -> Tensor:
        if isinstance(self.root, Tensor):
            return self.root.square().sum(0)
        return super().diagonal()

    def trace(self) -> Tensor:
        return self.gram_matrix().diagonal().sum()

    def shifted_logdet(self, lam: Scalar) -> Tensor:
        # det(lam I_n + U^T U) = lam^(n - k) det(lam I_k + U U^T)
        lam = torch.as_tensor(lam, dtype=self.dtype, device=self.device)
        return (self.shape[0] - self.rank) * lam.log() + Dense(self.gram_matrix()).shifted_logdet(lam)

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.gram_matrix())

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]}x{self.shape[1]}, rank {self.rank})"
