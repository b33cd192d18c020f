"""The linear problems of a Gauss-Newton step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from precond.step.graph import GaussNewtonMatrix
from solvers import CG, Cholesky, Dense, Function, LinearOperator, Nystrom, Tikhonov, power
from solvers.triangles import gram


class LeastSquares(ABC):
    r"""Damped linear least squares in the Jacobian of residuals, ``J (R, P)``.

    Attributes:
        factored: Whether a second fit with the same damping costs little beside the first.
    """

    factored: ClassVar[bool] = False

    @abstractmethod
    def fit(self, target: Tensor, damping: float) -> Tensor:
        r"""The v that minimises :math:`\lVert J v - t \rVert^2 + \lambda \lVert D v \rVert^2`, ``(R,)`` to ``(P,)``."""

    @abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """``J v``."""

    @abstractmethod
    def size(self, v: Tensor) -> float:
        """``|D v|``."""


class DenseLeastSquares(LeastSquares):
    r"""By Cholesky, in the size of the parameters or in that of the residuals.

    .. math:: (J^\top J + \lambda D^2)^{-1} J^\top t = D^{-1} \tilde J^\top (\tilde J \tilde J^\top + \lambda I)^{-1} t,
        \qquad \tilde J = J D^{-1}

    The second form never divides by :math:`\lambda`, unlike Woodbury's on :math:`J^\top t`, so it stays accurate where
    :math:`\lambda` is tiny.

    Args:
        jacobian: J, ``(R, P)``; is scaled in place.
        scale: The diagonal of D, positive, ``(P,)``.
        rows: Solve in the size of the residuals.
    """

    factored = True

    def __init__(self, jacobian: Tensor, scale: Tensor | None, rows: bool) -> None:
        self.scale, self.rows = scale, rows
        self.jacobian = jacobian if scale is None else jacobian.div_(scale)
        self._inverse: tuple[float, LinearOperator] | None = None

    @cached_property
    def gram(self) -> Tensor:
        """``J J^T (R, R)`` or ``J^T J (P, P)``, of the scaled Jacobian."""
        return gram(self.jacobian.mT if self.rows else self.jacobian)

    def inverse(self, damping: float) -> LinearOperator:
        """Of the damped Gram matrix; that of the last damping is kept."""
        if self._inverse is None or self._inverse[0] != damping:
            damped = Tikhonov(damping)(Dense(self.gram, is_gram=True))
            self._inverse = damping, power(damped, -1, Cholesky(explicit=False))
        return self._inverse[1]

    def fit(self, target: Tensor, damping: float) -> Tensor:
        inverse = self.inverse(damping)
        if self.rows:
            solution = self.jacobian.mT @ (inverse @ target)
        else:
            solution = inverse @ (self.jacobian.mT @ target)
        return solution if self.scale is None else solution / self.scale

    def push(self, v: Tensor) -> Tensor:
        return self.jacobian @ (v if self.scale is None else v * self.scale)

    def size(self, v: Tensor) -> float:
        return float((v if self.scale is None else v * self.scale).norm())


class MatrixFreeLeastSquares(LeastSquares):
    """By conjugate gradients on ``J^T J + lam I``, with products alone.

    Args:
        matrix: Products with J and its transpose, of one output.
        solver: Solves.
        sketch: Makes a preconditioner, once for all dampings.
    """

    def __init__(self, matrix: GaussNewtonMatrix, solver: CG, sketch: Nystrom | None = None) -> None:
        self.matrix, self.solver, self.nystrom = matrix, solver, sketch

    @cached_property
    def operator(self) -> Function:
        """``J^T J``."""
        plain = self.matrix.operator()

        def product(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            found = self.matrix.products(rows) if len(rows) > 1 else self.matrix.product(rows[0])
            return found.reshape(x.shape)

        return Function(product, plain.in_shape, symmetric=True, dtype=plain.dtype, device=plain.device)

    @cached_property
    def preconditioner(self) -> Callable[[float], LinearOperator] | None:
        """Damping to preconditioner, from one sketch of ``J^T J``."""
        return None if self.nystrom is None else self.nystrom.sketch(self.operator).precondition

    def fit(self, target: Tensor, damping: float) -> Tensor:
        solver = self.solver
        if damping > 0 and self.preconditioner is not None:
            solver = replace(solver, preconditioner=self.preconditioner(damping))
        return solver.solve(Tikhonov(damping)(self.operator), self.matrix.pull([target]))

    def push(self, v: Tensor) -> Tensor:
        return self.matrix.push(v)[0]

    def size(self, v: Tensor) -> float:
        return float(v.norm())
