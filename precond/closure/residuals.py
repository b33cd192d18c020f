"""Residuals of a least-squares problem, and the linear problems of a Gauss-Newton step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from precond.step.graph import GaussNewtonMatrix
from solvers import CG, Cholesky, Dense, Function, LinearOperator, Nystrom, Tikhonov, power
from solvers.triangles import gram


@dataclass(frozen=True)
class PointwiseResidual:
    r"""Residuals at points, each of which depends on one point alone; their Jacobian is taken point by point.

    .. math:: r_n = w\, f(u, x_n), \qquad u(x) = \text{model}(x)

    Costs one Jacobian of f per point under ``vmap``, while a residual given as a tensor costs a backward
    pass over all points for each row.

    Args:
        model: Maps a batch ``(N, d)`` to ``(N, ...)``, example by example; without buffers that it changes.
        function: ``f(u, x)`` with ``u`` the model as a function of one point ``(d,)`` and ``x`` one point; may use
            ``torch.func`` on ``u``. Returns a tensor.
        points: ``(N, d)``.
        weight: w, often ``N ** -0.5``.
    """

    model: nn.Module
    function: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    points: Tensor
    weight: float = 1.0

    def numel(self) -> int:
        """Number of residuals, ``N * entries``."""
        return 0 if not len(self.points) else len(self.points) * self.at({}, self.points[0]).numel()

    def value(self, graph: bool = True) -> Tensor:
        """``(N * entries,)``.

        Args:
            graph: Whether it can be differentiated with respect to the parameters.
        """
        values = {} if graph else {name: p.detach() for name, p in self.model.named_parameters()}
        return vmap(lambda x: self.at(values, x))(self.points).reshape(-1)

    def value_and_jacobian(self, params: list[Tensor], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residuals ``(R,)`` and their Jacobian ``(R, P)`` with respect to the concatenated parameters.

        Args:
            params: The parameters.
            out: Where the Jacobian goes.

        Raises:
            ValueError: If the function uses one of the parameters other than through the model.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        free = {names[id(p)]: p.detach() for p in params if id(p) in names}
        self._require_through_model(free, params)

        def both(values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            r = self.at(values, x)
            return r, r

        rows, value = vmap(jacrev(both, has_aux=True), in_dims=(None, 0))(free, self.points)
        count = value.numel()
        if out is None:
            out = value.new_empty(count, sum(p.numel() for p in params))
        for p, block in zip(params, out.split([p.numel() for p in params], 1), strict=True):
            name = names.get(id(p))
            block.copy_(rows[name].reshape(count, -1)) if name is not None else block.zero_()
        return value.reshape(-1), out

    def _require_through_model(self, free: dict[str, Tensor], params: list[Tensor]) -> None:
        with torch.enable_grad():
            r = self.at(free, self.points[0]).sum() if len(self.points) else torch.zeros(())
        if not r.requires_grad:
            return
        slopes = torch.autograd.grad(r, params, allow_unused=True)
        shapes = [str(tuple(p.shape)) for p, slope in zip(params, slopes, strict=True) if slope is not None]
        if shapes:
            raise ValueError(
                f"the function of a PointwiseResidual uses trained parameters of shapes {', '.join(shapes)} other than "
                "through u, where its Jacobian does not see them. Let the model return them as a further output (as "
                "docs/how-to/physics.md does with an unknown coefficient), or return the residual as a tensor."
            )

    def at(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        """The residuals of one point, ``(entries,)``, with some parameters in place of the model's."""

        def u(point: Tensor) -> Tensor:
            return functional_call(self.model, values, (point.unsqueeze(0),)).squeeze(0)

        return self.weight * self.function(u, x).reshape(-1)


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
