"""Some rows and columns of an operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.operators.linear_operator import LinearOperator, Shape


@dataclass(frozen=True, eq=False, repr=False)
class Submatrix(LinearOperator):
    """Rows and columns of the matrix of ``op`` by flat index; one product with ``op`` per product.

    Args:
        op: Any operator.
        rows: Flat indices into ``op.out_shape``, ``(r,)``.
        columns: Flat indices into ``op.in_shape``, ``(c,)``.

    Raises:
        ValueError: If the indices are not 1-D integers.
    """

    op: LinearOperator
    rows: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        """Check the border."""
        for name, index in (("rows", self.rows), ("columns", self.columns)):
            if index.ndim != 1 or index.dtype != torch.int64:
                raise ValueError(f"{name} are flat int64 indices (k,), not {index.dtype} {tuple(index.shape)}.")

    @property
    def in_shape(self) -> Shape:
        return tuple(self.columns.shape)

    @property
    def out_shape(self) -> Shape:
        return tuple(self.rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.op.dtype

    @property
    def device(self) -> torch.device:
        return self.op.device

    @property
    def symmetric(self) -> bool:
        return self.op.symmetric and torch.equal(self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        batch = x.shape[:-1]
        full = x.new_zeros(*batch, self.op.shape[1]).index_add(-1, self.columns, x)
        y = self.op.apply(full.reshape(*batch, *self.op.in_shape))
        return y.reshape(*batch, self.op.shape[0])[..., self.rows]

    def adjoint(self) -> Submatrix:
        return Submatrix(self.op.adjoint(), self.columns, self.rows)

    def diagonal(self) -> Tensor:
        if not torch.equal(self.rows, self.columns):
            return super().diagonal()
        return self.op.diagonal().flatten()[self.rows]
