"""Operators made of other operators: multiples, sums, products, shifts and submatrices, kept symbolic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.operators.bases import Derived, Wrapper
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape, answers
from solvers.operators.storable import storable
from solvers.outcome.arguments import all_of, instance, number


def _operator(name: str, value: Any) -> Any:
    return instance(name, value, LinearOperator, "a LinearOperator such as Dense(matrix)")


def _scalar(name: str, value: Any) -> Any:
    """A number or a tensor; tensors are not read."""
    if isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool and value.ndim == 0:
        return value
    return number(name, value)


@answers("scale")
@storable
@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Wrapper):
    """``scalar * op``."""

    op: LinearOperator
    scalar: Scalar

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _operator("op", self.op)
        _scalar("scalar", self.scalar)

    def apply(self, x: Tensor) -> Tensor:
        return self.scalar * self.op.apply(x)

    def adjoint(self) -> LinearOperator:
        return Scaled(self.op.adjoint(), self.scalar)

    def scale(self, scalar: Scalar) -> LinearOperator:
        return Scaled(self.op, scalar * self.scalar)

    def diagonal(self) -> Tensor:
        return self.scalar * self.op.diagonal()

    def trace(self) -> Tensor:
        return self.scalar * self.op.trace()

    def frobenius_norm(self) -> Tensor:
        return (self.scalar * self.op.frobenius_norm()).abs()

    def __repr__(self) -> str:
        return f"{float(self.scalar):g} * {self.op!r}"


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Sum(Derived):
    """Sum of operators of equal shapes."""

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        all_of("terms", self.terms, _operator)
        if len({(op.in_shape, op.out_shape, op.dtype) for op in self.terms}) != 1:
            raise ValueError(f"The terms of a sum need equal shapes and dtypes, not {self.terms}.")

    @property
    def in_shape(self) -> Shape:
        return self.terms[0].in_shape

    @property
    def out_shape(self) -> Shape:
        return self.terms[0].out_shape

    @property
    def source(self) -> LinearOperator:
        return self.terms[0]

    @property
    def symmetric(self) -> bool:
        return all(op.symmetric for op in self.terms)

    def apply(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (op.apply(x) for op in self.terms))

    def adjoint(self) -> LinearOperator:
        return Sum(tuple(op.adjoint() for op in self.terms))

    def plus(self, other: LinearOperator) -> LinearOperator:
        return Sum((*self.terms, other))

    def diagonal(self) -> Tensor:
        return reduce(torch.add, (op.diagonal() for op in self.terms))

    def trace(self) -> Tensor:
        return reduce(torch.add, (op.trace() for op in self.terms))

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.terms))})"


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Product(Derived):
    """Composition ``A_1 A_2 ... A_k``; the last acts first."""

    factors: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not all_of("factors", self.factors, _operator):
            raise ValueError("factors is a tuple of at least one operator, not ().")
        for left, right in pairwise(self.factors):
            if left.in_shape != right.out_shape:
                raise ValueError(f"{left!r} acts on {left.in_shape} and cannot follow {right!r}, to {right.out_shape}.")

    @property
    def in_shape(self) -> Shape:
        return self.factors[-1].in_shape

    @property
    def out_shape(self) -> Shape:
        return self.factors[0].out_shape

    @property
    def source(self) -> LinearOperator:
        return self.factors[0]

    def apply(self, x: Tensor) -> Tensor:
        return reduce(lambda y, op: op.apply(y), reversed(self.factors), x)

    def adjoint(self) -> LinearOperator:
        return Product(tuple(op.adjoint() for op in reversed(self.factors)))

    def compose(self, other: LinearOperator) -> LinearOperator:
        return Product((*self.factors, other))

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.factors))})"


@answers("shift")
@storable
@dataclass(frozen=True, eq=False, repr=False)
class Shifted(Wrapper):
    """``op + lam I``. A shift destroys most structures, so it stays symbolic until a solver decides.

    Args:
        op: Square operator.
        lam: Number or 0-d tensor, in units of ``op``.

    Raises:
        ValueError: If ``op`` is not square or ``lam`` is not a scalar.
    """

    op: LinearOperator
    lam: Scalar

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _operator("op", self.op)
        if not (isinstance(self.lam, Tensor) and self.lam.ndim):
            _scalar("lam", self.lam)
        if self.op.in_shape != self.op.out_shape:
            raise ValueError(f"Only a square operator has a shift; {self.op!r} goes to {self.op.out_shape}.")
        if isinstance(self.lam, Tensor) and self.lam.ndim:
            raise ValueError(f"A shift lam is a number or a 0-d tensor, not shape {tuple(self.lam.shape)}.")

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
        return self.op.shifted_logdet(self.lam)

    def frobenius_norm(self) -> Tensor:
        squares = self.op.frobenius_norm() ** 2 + 2 * self.lam * self.op.trace() + self.lam**2 * self.shape[0]
        return squares.clamp(min=0).sqrt()

    def __repr__(self) -> str:
        return f"Shifted({self.op!r}, {float(self.lam):g})"


@answers("submatrix")
@dataclass(frozen=True, eq=False, repr=False)
class Submatrix(Wrapper):
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
        """Validate the arguments."""
        _operator("op", self.op)
        for name, index in (("rows", self.rows), ("columns", self.columns)):
            instance(name, index, Tensor, "a tensor of indices")
            if index.ndim != 1 or index.dtype != torch.int64:
                raise ValueError(f"{name} are flat int64 indices (k,), not {index.dtype} {tuple(index.shape)}.")

    @property
    def in_shape(self) -> Shape:
        return tuple(self.columns.shape)

    @property
    def out_shape(self) -> Shape:
        return tuple(self.rows.shape)

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


@answers("plus")
def _sum(left: LinearOperator, right: LinearOperator) -> Sum:
    return Sum((left, right))


@answers("compose")
def _product(left: LinearOperator, right: LinearOperator) -> Product:
    return Product((left, right))
