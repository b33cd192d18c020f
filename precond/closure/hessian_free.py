"""Hessian-free optimisation."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.closure.gauss_newton_optimizer import GaussNewtonClosureOptimizer
from precond.step.adapt import LevenbergMarquardt
from precond.step.base import MomentumOptions
from precond.step.graph import GaussNewtonMatrix, flatten, unflatten
from precond.step.methods import Taxonomy
from precond.step.schedules import FIXED
from solvers import CG, Diagonal

_RULE = LevenbergMarquardt(decrease=2 / 3, increase=3 / 2)


class HessianFree(GaussNewtonClosureOptimizer):
    r"""Hessian-free optimisation: conjugate gradients on the Gauss-Newton matrix, one batch per step.

    Minimises the damped model :math:`g^\top m + \tfrac12 m^\top (G + \lambda I) m` by CG from ``warm_start`` times the
    previous solution, until each of the last ``max(10, k / 10)`` steps gained less than ``min_progress`` of it; keeps
    the iterates at steps :math:`1.3^j`, goes back along them while the loss falls, shortens the step by 0.8 until the
    loss has fallen by 1% of what the slope promises, and adapts :math:`\lambda` by the reduction ratio.

    Prefer it for deep models trained on large batches, such as autoencoders, where few but costly steps pay. A step
    costs about five gradients per CG step. Memory: the graph of the batch, and one vector per stored iterate.

    ============================================ =========================================================
    Martens (2010)                               here
    ============================================ =========================================================
    section 4.1, damping                         ``directions``: :class:`LevenbergMarquardt`
    section 4.2, products with G                 ``step.graph.GaussNewtonMatrix``
    section 4.4, when CG stops                   ``_solve``: :class:`~solvers.CG` with ``stop="progress"``
    section 4.5, starting from the last solution ``_solve``: ``remembered``
    section 4.6, going back along the iterates   ``_solve``: ``keep``; ``_backtrack``
    section 4.7, preconditioner                  ``_solve``: ``GaussNewtonMatrix.sampled_diagonal``
    the line search                              ``_rate``
    ============================================ =========================================================

    Args:
        model: The model, or parameters, groups, or named parameters.
        loss_fn: The loss module that the closure calls.
        lr: Multiplies the step that was found; 1 is the method's.
        damping: :math:`\lambda` at the start, in units of G.
        damping_rule: How the damping is adapted; ``None`` leaves it.
        max_steps: CG steps at most.
        rtol: Also stop CG at this relative residual.
        min_progress: Gain per step, relative to the model's value, below which CG stops.
        warm_start: Share of the previous solution that CG starts from, in [0, 1].
        preconditioner: Precondition CG by ``(diag(G) + lam) ** 0.75``, with the diagonal estimated by ``samples``
            draws.
        samples: Draws for the preconditioner; a backward pass each.
        options: See :class:`GaussNewtonClosureOptimizer`.

    References:
        Martens (2010), https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf; Martens and Sutskever (2012)
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="GGN",
        structure="matrix-free",
        solver="preconditioned CG",
        matrices=("GGN",),
        forms=("matrix-free",),
        step="about five gradients for each step of CG",
        refresh="none",
        memory="5mn, the graph of the batch",
        paper="https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf",
    )

    fixed: ClassVar[frozenset[str]] = FIXED | {"damping"}  # it is adapted
    loop_settings: ClassVar[frozenset[str]] = GaussNewtonClosureOptimizer.loop_settings | {"seed"}

    def __init__(
        self,
        model: Any,
        loss_fn: Any,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 1.0,
        damping_rule: LevenbergMarquardt | None = _RULE,
        max_steps: int = 250,
        rtol: float = 1e-10,
        min_progress: float = 5e-4,
        warm_start: float = 0.95,
        preconditioner: bool = True,
        samples: int = 4,
        **options: Unpack[MomentumOptions],
    ) -> None:
        if not 0 <= warm_start <= 1:
            raise ValueError(f"warm_start is the share of the previous solution, in [0, 1]; got {warm_start}.")
        if samples < 1:
            raise ValueError(f"samples must be at least 1; got {samples}.")
        self.rule = self.ruled(damping_rule, judges=False)
        self.max_steps, self.rtol, self.min_progress, self.warm_start = max_steps, rtol, min_progress, warm_start
        self.preconditioner, self.samples = preconditioner, samples
        super().__init__(model, loss_fn, lr=lr, defaults={"damping": damping}, **options)

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        params = list(gradients)
        if not math.isfinite(float(self.value)):  # no step can be judged by such a loss: refused, aloud
            return {p: torch.full_like(p, torch.nan) for p in params}
        g = self.sign * flatten(gradients)
        matrix, damping = self.matrix(params), float(self.common("damping"))
        iterates = self._solve(matrix, damping, g, params)
        step = self._backtrack(g, iterates, params)
        self.remember("solution", iterates[-1], params)
        for p in params:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        if self.rule is not None and self.steps % self.rule.period == 0:
            predicted = float(g @ step - 0.5 * (step @ matrix.product(step)))
            change = float(self.value) - float(self._value_after(step, params))
            self.judged = (-predicted, -change)
            self.set_damping(self.rule.judged(damping, change, predicted))
        rate = self._rate(g, step, params)
        return unflatten(self.sign * rate * step, params)

    def _solve(self, matrix: GaussNewtonMatrix, damping: float, g: Tensor, params: list[Tensor]) -> list[Tensor]:
        """Iterates of CG on ``(G + lam I) d = g`` at steps ``ceil(1.3^j)``, the last one last."""
        steps = max((self.state[p].get("step", 0) for p in params), default=0)
        old = self.remembered("solution", params)
        inverse = None
        if self.preconditioner:
            generator = torch.Generator(device=g.device).manual_seed(self.loop.seed * 1_000_003 + steps)
            inverse = Diagonal((matrix.sampled_diagonal(self.samples, generator) + damping) ** -0.75)
        kept: list[Tensor] = []
        wanted = {math.ceil(1.3**j) for j in range(1, 40)}

        def keep(number: int, x: Tensor) -> None:
            if number in wanted:
                kept.append(x.clone())

        cg = CG(
            rtol=self.rtol,
            max_steps=self.max_steps,
            preconditioner=inverse,
            stop="progress",
            min_progress=self.min_progress,
            negative_curvature="stop",
            progress=False,
        )
        final = cg.run(matrix.operator().shift(damping), g, self.warm_start * old, callback=keep).x
        return [*kept, final]

    def _backtrack(self, g: Tensor, iterates: list[Tensor], params: list[Tensor]) -> Tensor:
        """The iterate before which the loss stops falling, from the last one backwards."""
        best, value = iterates[-1], float(self._value_after(iterates[-1], params))
        for earlier in reversed(iterates[:-1]):
            candidate = float(self._value_after(earlier, params))
            if candidate > value:
                break
            best, value = earlier, candidate
        return best

    def _rate(self, g: Tensor, step: Tensor, params: list[Tensor]) -> float:
        """Largest power of 0.8 that lowers the loss enough; zero if none does."""
        before, slope = float(self.value), float(g @ step)
        noise = 10 * torch.finfo(g.dtype).eps * abs(before)
        for k in range(60):
            rate = 0.8**k
            if float(self._value_after(rate * step, params)) <= before - 1e-2 * rate * slope + noise:
                return rate
        return 0.0

    def _value_after(self, direction: Tensor, params: list[Tensor]) -> Tensor:
        return self.value_at(unflatten(-direction, params))
