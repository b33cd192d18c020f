"""Gauss-Newton for least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from precond.adapt import LevenbergMarquardt
from precond.closure import Closure, ClosureOptimizer, flatten, jacobian_rows, unflatten
from precond.methods import Taxonomy
from precond.products import GaussNewtonMatrix, Part
from solvers import CG, Cholesky, Dense, LinearOperator, LowRank, Tikhonov, Woodbury, power

SolverName = Literal["auto", "cholesky", "woodbury", "cg"]


@dataclass(frozen=True)
class PointwiseResidual:
    r"""Residuals at points, each of which depends on one point alone; their Jacobian is taken point by point.

    .. math:: r_n = w\, f(u, x_n), \qquad u(x) = \text{model}(x)

    Costs one Jacobian of f per point under ``vmap``, where a residual that is only known as a tensor costs a backward
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

    def value(self) -> Tensor:
        """``(N * entries,)``."""
        return vmap(lambda x: self._at({}, x))(self.points).reshape(-1)

    def value_and_jacobian(self, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Residuals ``(R,)`` and their Jacobian ``(R, P)`` with respect to the concatenated parameters."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        free = {names[id(p)]: p.detach() for p in params if id(p) in names}

        def both(values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            r = self._at(values, x)
            return r, r

        rows, value = vmap(jacrev(both, has_aux=True), in_dims=(None, 0))(free, self.points)
        count = value.numel()
        blocks = []
        for p in params:
            name = names.get(id(p))
            blocks.append(p.new_zeros(count, p.numel()) if name is None else rows[name].reshape(count, -1))
        return value.reshape(-1), torch.cat(blocks, 1)

    def _at(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return functional_call(self.model, values, (point.unsqueeze(0),)).squeeze(0)

        return self.weight * self.function(u, x).reshape(-1)


class GaussNewton(ClosureOptimizer):
    r"""Gauss-Newton and Levenberg-Marquardt for least squares, such as physics-informed networks.

    For :math:`L = \tfrac12 \lVert r(\theta) \rVert^2` with residuals r and their Jacobian J,

    .. math:: d = (J^\top J + \lambda I)^{-1} (J^\top r + \lambda \mu\, d_{previous})

    The closure returns the *residuals*, a tensor or a list of tensors of any shapes and of
    :class:`PointwiseResidual`; scale them so that L is the loss that is meant (``N ** -0.5`` for a mean of squares,
    halved). ``step`` returns L. With ``adapt`` the damping follows the reduction ratio, and steps that do not lower L
    are rejected.

    Prefer it for smooth deterministic problems that are wanted to high accuracy, with up to some thousands of
    parameters or residuals, and in float64. With R residuals a step costs the Jacobian, and ``R P min(R, P) +
    min(R, P)^3 / 3``: by Cholesky if ``P <= R``, by Woodbury if ``R < P``, or some products under CG. Memory ``R P``,
    or the graph of the residuals under CG.

    Args:
        params: The model, or parameters, groups, or named parameters.
        lr: Step length.
        damping: :math:`\lambda`, in units of :math:`J^\top J`; where it starts, with ``adapt``.
        solver: ``"cholesky"`` in the size of the parameters, ``"woodbury"`` in that of the residuals, ``"auto"`` for
            the smaller one, ``"cg"`` or a :class:`~solvers.CG` for matrix-free products.
        adapt: ``True`` for the usual rule, another rule, or ``False``.
        spring: :math:`\mu`, momentum inside the solve (SPRING), in [0, 1).
        weight_decay: Decoupled weight decay.
        options: See :class:`SecondOrderOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Marquardt (1963); Mueller and Zeinhofer (2023), https://arxiv.org/abs/2302.13163; Goldshlager, Abrahamsen and
        Lin (2024), SPRING, https://arxiv.org/abs/2401.10190
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="GGN of a sum of squares",
        structure="dense, low rank or matrix-free",
        solver="Cholesky, Woodbury or CG",
        matrices=("GGN",),
        forms=("dense", "low rank", "matrix-free"),
        step="the Jacobian of R residuals, 2RP min(R, P) + min(R, P)³/3",
        refresh="none",
        memory="RP",
        paper="https://arxiv.org/abs/2302.13163",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 1e-3,
        solver: SolverName | CG = "auto",
        adapt: bool | LevenbergMarquardt = True,
        spring: float = 0.0,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        if not isinstance(solver, CG) and solver not in get_args(SolverName):
            raise ValueError(f"solver is one of {', '.join(get_args(SolverName))}, or a CG; got {solver!r}.")
        if not 0 <= spring < 1:
            raise ValueError(f"spring is the weight of the previous step, in [0, 1); got {spring}.")
        self.solver = solver
        self.rule = LevenbergMarquardt() if adapt is True else adapt or None
        self.spring = spring
        self._jacobian: Tensor | None = None
        self._residual: Tensor | None = None
        params = params.parameters() if isinstance(params, nn.Module) else params
        super().__init__(params, lr=lr, weight_decay=weight_decay, defaults={"damping": damping}, **options)

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        if options["decay"] == "l2":
            raise ValueError("decay='l2' is no sum of squared residuals; let the closure also return weight**0.5 * p.")

    @property
    def matrix_free(self) -> bool:
        """Whether J is used by products only."""
        return self.solver == "cg" or isinstance(self.solver, CG)

    def release(self) -> None:
        super().release()
        self._jacobian = self._residual = None

    def objective(self, closure: Closure) -> Tensor:
        return sum((0.5 * r.detach().square().sum() for r in self._tensors(closure)), torch.zeros(()))

    def _tensors(self, closure: Closure) -> list[Tensor]:
        with torch.enable_grad():
            return [r.value() if isinstance(r, PointwiseResidual) else r for r in self._residuals(closure)]

    def _residuals(self, closure: Closure) -> list[Tensor | PointwiseResidual]:
        given = self.run(closure)
        found = list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else [given]
        for r in found:
            if not isinstance(r, (Tensor, PointwiseResidual)) or (isinstance(r, Tensor) and not r.requires_grad):
                what = "a tensor without graph" if isinstance(r, Tensor) else type(r).__name__
                raise TypeError(
                    "the closure of GaussNewton must return residuals, tensors with their graph or PointwiseResidual, "
                    f"not {what}. The loss that is minimised is half their sum of squares."
                )
        if not found:
            raise TypeError("the closure of GaussNewton returned no residuals.")
        return found

    @torch.enable_grad()
    def _evaluate(self, closure: Closure | None) -> Any:
        assert closure is not None
        self._closure, params = closure, self.parameters()
        if self.matrix_free:
            residuals = self._tensors(closure)
            self._residual = torch.cat([r.reshape(-1) for r in residuals])
            found = torch.autograd.grad(
                self._residual, params, self._residual.detach(), retain_graph=True, allow_unused=True
            )
            self._slopes = {p: g for p, g in zip(params, found, strict=True) if g is not None}
        else:
            values, rows = zip(*[self._rows(r, params) for r in self._residuals(closure)], strict=True)
            self._residual, self._jacobian = torch.cat(values), torch.cat(rows)
            self._slopes = unflatten(self._jacobian.mT @ self._residual, params)
        for p in params:
            p.grad = self._slopes[p].detach().to(p.dtype).clone() if p in self._slopes else None
        self._value = 0.5 * self._residual.detach().square().sum()
        return self._value

    def _rows(self, residual: Tensor | PointwiseResidual, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        if isinstance(residual, PointwiseResidual):
            value, rows = residual.value_and_jacobian(params)
        else:
            value, rows = residual.reshape(-1), jacobian_rows(residual.reshape(-1), params)
        return value.detach().to(rows.dtype), rows.detach()

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if self.sign < 0:
            raise ValueError("GaussNewton minimises a sum of squares; maximize=True has no meaning for it.")
        params = list(gradients)
        g, curvature = flatten(gradients), self._curvature(params)
        old = flatten({p: self.state[p].get("direction", torch.zeros_like(p)) for p in params})

        def solve(damping: float) -> Tensor:
            return self._solve(curvature, damping, g + damping * self.spring * old)

        if self.rule is None:
            direction = solve(float(self.common("damping")))
        else:
            direction = self.levenberg_marquardt(self.rule, g, solve, curvature.__matmul__)
        out = unflatten(direction, params)
        if self.spring:
            for p in params:
                self.state[p]["direction"] = out[p].clone()
        return out

    def _curvature(self, params: list[Tensor]) -> LinearOperator:
        assert self._residual is not None
        if self.matrix_free:
            return GaussNewtonMatrix([Part(self._residual, lambda x: x)], params).operator()
        assert self._jacobian is not None
        few = self._jacobian.shape[0] < self._jacobian.shape[1]
        if self.solver == "woodbury" or (self.solver == "auto" and few):
            return LowRank(self._jacobian, self._jacobian @ self._jacobian.mT)
        return Dense(self._jacobian.mT @ self._jacobian)

    def _solve(self, curvature: LinearOperator, damping: float, b: Tensor) -> Tensor:
        damped = Tikhonov(damping)(curvature)
        if isinstance(self.solver, CG):
            return self.solver.solve(damped, b)
        if self.solver == "cg":
            return CG(rtol=1e-8, progress=False).solve(damped, b)
        return power(damped, -1, Woodbury() if isinstance(curvature, LowRank) else Cholesky(explicit=False)) @ b
