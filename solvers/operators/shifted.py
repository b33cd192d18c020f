"""``A + lam I``, kept symbolic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.operators.dense import Dense
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.low_rank import LowRank


@dataclass(frozen=True, eq=False, repr=False)
class Shifted(LinearOperator):
    """``op + lam I``. A shift destroys most structures, so it has its own place until a solver decides.

    Args:
        op: Square operator.
        lam: Number or 0-d tensor, in units of ``op``.

    Raises:
        ValueError: If ``op`` is not square or ``lam`` is no scalar.
    """

    op: LinearOperator
    lam: Scalar

    def __post_init__(self) -> None:
        """Check the border."""
        if self.op.in_shape != self.op.out_shape:
            raise ValueError(f"Only a square operator has a shift; {self.op!r} goes to {self.op.out_shape}.")
        if isinstance(self.lam, Tensor) and self.lam.ndim:
            raise ValueError(f"A shift is a number or a 0-d tensor, not shape {tuple(self.lam.shape)}.")

    @property
    def in_shape(self) -> Shape:
        return self.op.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.op.in_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.op.dtype

    @property
    def device(self) -> torch.device:
        return self.op.device

    @property
    def symmetric(self) -> bool:
        return self.op.symmetric

    def apply(self, x: Tensor) -> Tensor:
        return self.op.apply(x) + self.lam * x

    def adjoint(self) -> Shifted:
        return Shifted(self.op.adjoint(), self.lam)

    def shift(self, lam: Scalar) -> Shifted:
        return Shifted(self.op, self.lam + lam)

    def scale(self, scalar: Scalar) -> Shifted:
        return Shifted(scalar * self.op, scalar * self.lam)

    def to_dense(self) -> Tensor:
        dense = self.op.to_dense().clone()
        dense.diagonal().add_(self.lam)
        return dense

    def diagonal(self) -> Tensor:
        return self.op.diagonal() + self.lam

    def trace(self) -> Tensor:
        return self.op.trace() + self.lam * self.shape[0]

    def logdet(self) -> Tensor:
        from solvers.rules import absorb_shift

        if isinstance(self.op, LowRank):
            # det(lam I_n + U^T U) = lam^(n - k) det(lam I_k + U U^T)
            lam = torch.as_tensor(self.lam, dtype=self.dtype, device=self.device)
            gram = Dense(self.op.gram_matrix()).add_diagonal(lam)
            return (self.shape[0] - self.op.rank) * lam.log() + gram.logdet()
        absorbed = absorb_shift(self)
        return super().logdet() if isinstance(absorbed, Shifted) else absorbed.logdet()

    def frobenius_norm(self) -> Tensor:
        squares = self.op.frobenius_norm() ** 2 + 2 * self.lam * self.op.trace() + self.lam**2 * self.shape[0]
        return squares.clamp(min=0).sqrt()

    def __repr__(self) -> str:
        return f"Shifted({self.op!r}, {float(self.lam):g})"
