"""A symmetric operator by its eigenvectors and eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.operators.bases import Derived, SelfAdjoint
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal
from solvers.operators.kronecker import Kronecker
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import instance, real_tensor
from solvers.outcome.checks import require
from solvers.outcome.errors import SingularMatrixError


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Eigen(SelfAdjoint, Derived):
    r"""``Q diag(values) Q^T`` with an orthogonal basis ``Q``; the form of EKFAC and SOAP, and of exact damping.

    Shifts and powers act on the spectrum alone. With a Kronecker basis the memory is that of its factors and of one
    tensor of ``in_shape``.

    Args:
        basis: Orthogonal operator, Dense or Kronecker; its columns are the eigenvectors. Orthogonality is not checked.
        values: Eigenvalues, shaped as ``basis.in_shape``.

    Raises:
        ValueError: If the basis is not square or ``values`` has another shape.
    """

    basis: LinearOperator
    values: Tensor

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("basis", self.basis, LinearOperator, "a LinearOperator such as Dense(matrix)")
        real_tensor("values", self.values)
        if self.basis.in_shape != self.basis.out_shape:
            raise ValueError(f"An eigenbasis is square; {self.basis!r} is not.")
        if tuple(self.values.shape) != self.basis.in_shape:
            raise ValueError(
                f"The values {tuple(self.values.shape)} need the shape {self.basis.in_shape} of the basis."
            )
        if self.values.dtype != self.basis.dtype:
            raise TypeError(f"Values ({self.values.dtype}) and basis ({self.basis.dtype}) need one dtype.")

    @property
    def in_shape(self) -> Shape:
        return self.basis.in_shape

    @property
    def source(self) -> Tensor:
        return self.values

    def apply(self, x: Tensor) -> Tensor:
        return self.basis.apply(self.values * self.basis.apply_adjoint(x))

    def shift(self, lam: Scalar) -> Eigen:
        return Eigen(self.basis, self.values + lam)

    def scale(self, scalar: Scalar) -> Eigen:
        return Eigen(self.basis, scalar * self.values)

    def diagonal(self) -> Tensor:
        # diag(Q S Q^T)_i = sum_j Q_ij^2 s_j
        return self._squared(self.basis).apply(self.values)

    def _squared(self, basis: LinearOperator) -> LinearOperator:
        """The operator of the squared entries."""
        match basis:
            case Dense():
                return Dense(basis.matrix.square())
            case Diagonal():
                return Diagonal(basis.values.square())
            case Kronecker():
                return basis.map(self._squared)
        raise self.no_exact("diagonal", "solvers.diagonal(op) for an estimate with its error")

    def trace(self) -> Tensor:
        return self.values.sum()

    def logdet(self) -> Tensor:
        require(
            (self.values > 0).all(), lambda: SingularMatrixError(f"{self!r} has an eigenvalue that is not positive.")
        )
        return self.values.log().sum()

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.values)

    def __repr__(self) -> str:
        return f"Eigen({self.basis!r})"
