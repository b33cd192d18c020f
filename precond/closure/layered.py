"""Least squares of residuals at points, by products from the rows of layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from torch import Tensor

from curvature.residuals.residual_rows import ResidualRows
from precond.closure.residuals import LeastSquares
from solvers import CG, Function, LinearOperator, Tikhonov, power


class LayeredLeastSquares(LeastSquares):
    r"""By conjugate gradients with exact products from layers, preconditioned by K-FAC.

    Args:
        rows: Residuals of each kind, with their rows.
        solver: Solves.

    References:
        Dangel, Mueller and Zeinhofer (2024), section 3, https://arxiv.org/abs/2405.15603
    """

    def __init__(self, rows: ResidualRows, solver: CG) -> None:
        self.rows, self.solver = rows, solver
        self.values = rows.values

    def push(self, v: Tensor) -> Tensor:
        return self.rows.push(v)

    def pull(self, w: Tensor) -> Tensor:
        """``J^T w``."""
        return self.rows.pull(w)

    def fit(self, target: Tensor, damping: float) -> Tensor:
        solver = replace(self.solver, preconditioner=self.preconditioner(damping)) if damping > 0 else self.solver
        return solver.solve(Tikhonov(damping)(self.operator), self.pull(target))

    def size(self, v: Tensor) -> float:
        return float(v.norm())

    @cached_property
    def operator(self) -> LinearOperator:
        """``J^T J``."""
        return self.rows.gram

    def preconditioner(self, damping: float) -> LinearOperator:
        """The inverse of the damped K-FAC; parameters outside layers have the damping alone."""
        inverses = [(block, power(Tikhonov(damping)(block.eigen), -1)) for block in self.rows.blocks]

        def apply(v: Tensor) -> Tensor:
            out = v / damping
            parts, places = self.rows.by_parameter(v), self.rows.by_parameter(out)
            for block, inverse in inverses:
                block.write(inverse @ block.read(parts), places)
            return out

        like = self.rows.like
        return Function(apply, like.shape, symmetric=True, dtype=like.dtype, device=like.device, batched=False)
