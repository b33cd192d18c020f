"""Sophia."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from precond.closure.optimizer import ClosureOptimizer
from precond.gradient.optimizer import GradientMomentumOptions, GradientOptimizer, Group, State, state_zeros
from precond.step.graph import Vectors
from precond.step.journal import REFRESHES
from precond.step.methods import Taxonomy
from precond.step.options import choice
from precond.step.schedules import Scheduled, ScheduledInt
from solvers.precision import working_dtype

Estimator = Literal["hutchinson", "gauss_newton"]


class Sophia(ClosureOptimizer, GradientOptimizer):
    r"""Sophia: momentum over a rarely estimated diagonal of the curvature, clipped entry by entry.

    .. math:: M \leftarrow \beta_1 M + (1 - \beta_1) g, \quad h \leftarrow \beta_2 h + (1 - \beta_2) \hat h, \quad
        d = \operatorname{clip}(M / \max(\gamma h, \epsilon), 1)

    where :math:`\hat h` is

    * ``"hutchinson"`` (Sophia-H): :math:`z \odot H z` with random signs z, every ``curvature_update_period`` steps of
      the parameter, from its first one on. These steps differentiate twice, so ``step`` needs a closure;
    * ``"gauss_newton"`` (Sophia-G): given by :meth:`update_curvature`, from gradients of the loss on labels that were
      drawn from the model's own predictions; ``step`` then runs in the plain loop.

    Entries with little or negative curvature move by ``lr`` along the sign, as in Lion; learning rates are AdamW's or
    somewhat below. Memory: two moments.

    ========================================================================= ===========================
    Liu et al.                                                                here
    ========================================================================= ===========================
    algorithm 1, Hutchinson's estimate                                        ``hutchinson_diagonal``
    algorithm 2, Gauss-Newton-Bartlett                                        ``update_curvature``
    algorithm 3: M, h                                                         ``direction``, ``_average``
    algorithm 3: :math:`\operatorname{clip}(M / \max(\gamma h, \epsilon), 1)` ``direction``
    algorithm 3: every k-th step                                              ``probed``
    ========================================================================= ===========================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; the largest move of an entry per step.
        betas: Decay of the averages of gradients and of the curvature.
        gamma: :math:`\gamma`; 0.01 suits ``"hutchinson"``, 0.05 ``"gauss_newton"``.
        eps: Smallest denominator.
        estimator: See above.
        curvature_update_period: Steps of a parameter between Hutchinson's estimates.
        options: See :class:`GradientOptimizer`.

    References:
        Liu et al. (2023), algorithms 1 to 3, https://arxiv.org/abs/2305.14342
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian (Hutchinson) or GGN (sampled labels)",
        structure="diagonal",
        solver="elementwise, clipped",
        matrices=("Hessian", "GGN"),
        forms=("diagonal",),
        step="O(mn)",
        refresh="a product with H, about two gradients",
        memory="mn",
        paper="https://arxiv.org/abs/2305.14342",
    )
    loop_settings: ClassVar[frozenset[str]] = ClosureOptimizer.loop_settings | {"seed"}
    takes_shards = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: Scheduled = 0.01,
        eps: Scheduled = 1e-12,
        estimator: Estimator = "hutchinson",
        curvature_update_period: ScheduledInt = 10,
        **options: Unpack[GradientMomentumOptions],
    ) -> None:
        self.estimator = choice("estimator", estimator, Estimator)
        super().__init__(
            params,
            lr=lr,
            defaults={
                "betas": betas,
                "gamma": gamma,
                "eps": eps,
                "curvature_update_period": curvature_update_period,
            },
            **options,
        )

    def check(self, options: Group) -> None:
        super().check(options)
        if not (options["gamma"] > 0 and options["eps"] > 0):
            raise ValueError(f"gamma and eps must be positive; got {options['gamma']} and {options['eps']}.")

    def initial_state(self, p: Tensor, group: Group) -> State:
        return {"exp_avg": state_zeros(p), "curvature": state_zeros(p), "updates": 0}

    def closure_needed(self) -> bool:
        return self.estimator == "hutchinson"

    def second_order(self) -> bool:
        return self.estimator == "hutchinson"

    def probed(self, params: list[Tensor]) -> list[Tensor]:
        if not self.second_order():
            return []
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        return [
            p
            for p in params
            if self.state.get(p, {}).get("step", 0) % group_of[p]["curvature_update_period"] == 0 and p.numel()
        ]

    @torch.no_grad()
    def update_curvature(self, terms: float) -> None:
        r"""Sophia-G's estimate from the present gradients: :math:`\hat h = B\, g \odot g`.

        Draw labels from the model's predictions, take the mean loss on them, call ``backward()``, then this, then
        ``zero_grad()``.

        Args:
            terms: B, the number of terms in the mean (examples, or positions of all examples).

        Raises:
            ValueError: If the optimizer was not made with ``estimator="gauss_newton"``, or B is not positive.
        """
        if self.estimator != "gauss_newton":
            raise ValueError("update_curvature() is for Sophia(..., estimator='gauss_newton').")
        if not terms > 0:
            raise ValueError(f"terms is the number of terms in the mean loss, positive; got {terms}.")
        gradients = self.true_gradients()
        with self.transaction():
            for group in self.param_groups:
                for p in group["params"]:
                    if gradients is not None and p in gradients and p.numel():
                        self.begin(p, group)
                        g = gradients[p].to(working_dtype(p))
                        self._average(p, terms * g.square(), group)
                        self.events[REFRESHES] += 1

    def directions(self, gradients: Vectors) -> Vectors:
        due = self.probed(list(gradients))
        self._estimate = self.hutchinson_diagonal(due, self.loop.seed) if due else {}
        return super().directions(gradients)

    def direction(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        if p in self._estimate:
            self._average(p, self._estimate[p], group)
        if not state["updates"] and self.estimator == "hutchinson":
            return torch.zeros_like(g)
        if not state["updates"]:
            raise RuntimeError(
                f"Sophia knows no curvature of {self.name_of(p)} yet. Call update_curvature() before the first step, "
                "with the gradients of the mean loss on labels drawn from the model's predictions."
            )
        momentum = state["exp_avg"].lerp_(g, 1 - group["betas"][0])
        newton = momentum / (group["gamma"] * state["curvature"]).clamp(min=group["eps"])
        if self.asked:
            self.note_cut("clipped", newton.abs() >= 1)
        return newton.clamp(-1, 1)

    def _average(self, p: Tensor, estimate: Tensor, group: Group) -> None:
        state = self.state[p]
        state["curvature"] = state["curvature"].lerp(estimate.to(working_dtype(p)), 1 - group["betas"][1])
        state["updates"] += 1
