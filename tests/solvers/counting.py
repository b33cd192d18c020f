"""Operators that count their products, to hold estimators to what they report."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from solvers import Function


class Counting:
    """A function of vectors ``(n,)`` as an operator, with the number of vectors and the largest block it has seen."""

    def __init__(self, product: Callable[[Tensor], Tensor], n: int, *, symmetric: bool = True) -> None:
        self.product, self.n = product, n
        self.vectors, self.largest = 0, 0
        self.op = Function(self._count, (n,), symmetric=symmetric, dtype=torch.float64)

    def _count(self, x: Tensor) -> Tensor:
        count = x.numel() // self.n
        self.vectors += count
        self.largest = max(self.largest, count)
        return self.product(x)


def known_by_products(matrix: Tensor, *, symmetric: bool = True) -> Function:
    """A matrix behind its products."""
    return Function(
        lambda x: x @ matrix.mT,
        (matrix.shape[1],),
        (matrix.shape[0],),
        rmatvec=lambda y: y @ matrix,
        symmetric=symmetric,
        dtype=matrix.dtype,
    )
