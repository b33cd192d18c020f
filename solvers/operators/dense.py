"""A matrix, or a stack of equal blocks."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from solvers.operators.bases import Derived
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import flag, instance
from solvers.outcome.checks import require
from solvers.outcome.errors import NonFiniteError, NotSymmetricError, SingularMatrixError


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Dense(Derived):
    """A matrix ``(m, n)``, or a stack ``(*stack, m, n)``: block-diagonal with equal blocks (grouped convolutions).

    Acts on tensors ``(*stack, n)``; a batch is one matrix product (one batched product for a stack).

    Args:
        matrix: ``(*stack, m, n)``, real.
        is_gram: The caller vouches that the matrix is symmetric (a sum of Gram matrices); solvers need not look.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions, or ``is_gram`` and it is not square.
        TypeError: If it is not real floating point.
    """

    matrix: Tensor
    is_gram: bool = False

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("matrix", self.matrix, Tensor, "a tensor")
        flag("is_gram", self.is_gram)
        if self.matrix.ndim < 2:
            raise ValueError(
                f"Dense takes a matrix (*stack, m, n), not shape {tuple(self.matrix.shape)}. "
                "For a diagonal use Diagonal(values)."
            )
        if self.is_gram and self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise ValueError(f"A Gram matrix is square, not {tuple(self.matrix.shape)}.")
        if not self.matrix.is_floating_point():
            raise TypeError(f"Dense takes a real floating-point matrix, not {self.matrix.dtype}.")

    @property
    def stack(self) -> Shape:
        """Leading dimensions of the matrix: one block each."""
        return tuple(self.matrix.shape[:-2])

    @property
    def in_shape(self) -> Shape:
        return (*self.stack, self.matrix.shape[-1])

    @property
    def out_shape(self) -> Shape:
        return tuple(self.matrix.shape[:-1])

    @property
    def source(self) -> Tensor:
        return self.matrix

    @property
    def symmetric(self) -> bool:
        """Whether the matrix equals its transpose up to rounding (reads the matrix)."""
        return self.is_gram or (self.matrix.shape[-1] == self.matrix.shape[-2] and bool(self.is_symmetric()))

    def is_symmetric(self) -> Tensor:
        """0-d boolean: ``max |A - A^T| <= sqrt(eps) max |A|``, without a host synchronisation.

        A float64 matrix whose entries beside the diagonal are float32 numbers was computed in float32, and is held to a
        hundred of float32's roundings. NaN and infinity pass here and have their own error.
        """
        if self.matrix.numel() == 0:
            return torch.ones((), dtype=torch.bool, device=self.device)
        skew = (self.matrix - self.matrix.mT).abs().amax()
        allowed = torch.full_like(skew, torch.finfo(self.dtype).eps ** 0.5)
        if self.dtype == torch.float64:
            wider = (self.matrix.float().double() == self.matrix).logical_not_()
            wider.diagonal(dim1=-2, dim2=-1).fill_(False)  # damping in float64 is added there
            allowed = torch.where(wider.any(), allowed, 100 * torch.finfo(torch.float32).eps)
        return (skew <= allowed * self.matrix.abs().amax()) | ~torch.isfinite(skew)

    def apply(self, x: Tensor) -> Tensor:
        if not self.stack:
            return x @ self.matrix.mT
        depth = len(self.stack)
        batch = x.shape[: x.ndim - depth - 1]
        columns = x.reshape(prod(batch), *self.in_shape).movedim(0, -2)  # (*stack, batch, n)
        return (columns @ self.matrix.mT).movedim(-2, 0).reshape(*batch, *self.out_shape)

    def adjoint(self) -> Dense:
        return self if self.is_gram else Dense(self.matrix.mT)

    def to_dense(self) -> Tensor:
        if not self.stack:
            return self.matrix
        return torch.block_diag(*self.matrix.flatten(0, -3))

    def submatrix(self, rows: Tensor, columns: Tensor | None = None) -> LinearOperator:
        if self.stack:
            return super().submatrix(rows, columns)
        return Dense(self.matrix[rows][:, rows if columns is None else columns])

    def add_diagonal(self, values: Scalar) -> Dense:
        """Add numbers to the diagonal: a scalar, one per block ``(*stack,)``, or one per entry ``(*stack, n)``."""
        matrix = self.matrix.clone()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        if isinstance(values, Tensor) and 0 < values.ndim == len(self.stack):
            values = values.unsqueeze(-1)
        diagonal += values
        return Dense(matrix, self.is_gram)

    def absorb_shift(self, lam: Scalar) -> Dense:
        return self.add_diagonal(lam)

    def plus(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Dense) and other.dtype == self.dtype:
            return Dense(self.matrix + other.matrix, self.is_gram and other.is_gram)
        return super().plus(other)

    def scale(self, scalar: Scalar) -> Dense:
        return Dense(scalar * self.matrix, self.is_gram)

    def compose(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Dense) and other.dtype == self.dtype:
            return Dense(self.matrix @ other.matrix)
        return super().compose(other)

    def diagonal(self) -> Tensor:
        self._need_square("diagonal")
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def logdet(self) -> Tensor:
        self._need_square("logdet")
        sign, logdet = torch.linalg.slogdet(self.matrix)
        require((sign > 0).all(), lambda: SingularMatrixError(f"{self!r} has a determinant that is not positive."))
        return logdet.sum()

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.matrix)

    def _need_square(self, quantity: str) -> None:
        if self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise ValueError(f"{self!r} is not square and has no {quantity}.")

    def __repr__(self) -> str:
        return f"Dense({'x'.join(map(str, self.matrix.shape))})"


def require_symmetric(op: Dense) -> None:
    """Refuse a matrix that is not square, not finite or not symmetric up to rounding.

    Factorisations read one triangle, so a matrix not known to be symmetric is checked as a whole.
    """
    if op.matrix.shape[-1] != op.matrix.shape[-2]:
        raise NotSymmetricError(f"{op!r} is not square; a least-squares solver such as LSMR() takes rectangles.")
    if not op.is_gram:
        require(op.is_symmetric(), lambda: _asymmetry(op))
        require(torch.isfinite(op.matrix).all(), lambda: non_finite(op))


def symmetric_part(matrix: Tensor) -> Tensor:
    """``(A + A^T) / 2`` of ``A (*stack, n, n)``."""
    return (matrix + matrix.mT) / 2


def non_finite(op: LinearOperator) -> NonFiniteError:
    """The refusal of NaN and infinity."""
    return NonFiniteError(f"{op!r} holds NaN or infinity. Leave the batch that caused it out of the statistics.")


def _asymmetry(op: Dense) -> NotSymmetricError:
    skew = float((op.matrix - op.matrix.mT).abs().max())
    return NotSymmetricError(
        f"{op!r} is not symmetric: it differs from its transpose by {skew:.3g}. Symmetrise it as (A + A.mT) / 2, "
        "or use LSMR() if it is meant."
    )
