"""Methods of ``step(closure)`` with a damping that follows how much of the promised decrease came true."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from precond.closure.optimizer import ClosureOptimizer
from precond.step.adapt import LevenbergMarquardt, unseen
from precond.step.graph import unflatten
from solvers import SolverError
from solvers.outcome.arguments import instance
from solvers.precision import working_dtype

#: A correction of a move, and the objective at the corrected one.
Bent = tuple[Tensor, float]

# Settings of a damping rule that need the statistics of layers.
_OF_LAYERS = ("relative_minimum", "relative_maximum", "next_batch")


class DampedOptimizer(ClosureOptimizer):
    """Base of the methods whose C is damped, by Levenberg and Marquardt's rule where one is given."""

    def ruled(self, rule: LevenbergMarquardt | None, judges: bool) -> LevenbergMarquardt | None:
        """A rule for the damping.

        Args:
            rule: As it was given.
            judges: Whether every step is judged, and taken back if it raises the loss, as by :meth:`damped_direction`;
                else every step is taken, and the damping adapted periodically.
        """
        instance("damping_rule", rule, LevenbergMarquardt, "a LevenbergMarquardt", optional=True)
        if rule is not None:
            rule.refuse(type(self).__name__, "period" if judges else "attempts", "reject_steps", *_OF_LAYERS)
        return rule

    def damped_direction(
        self,
        rule: LevenbergMarquardt | None,
        gradient: Tensor,
        solve: Callable[[float], Tensor],
        quadratic: Callable[[Tensor], Tensor],
        bend: Callable[[Tensor, float, float], Bent] | None = None,
    ) -> Tensor:
        r"""The direction under the damping of the groups, or under one whose step lowers the loss, which is adapted.

        With the move :math:`m = -\eta d`, :math:`d = (C + \lambda I)^{-1} g`, the ratio of the change of the loss to
        that of its model :math:`g^\top m + m^\top C m / 2` decides on the next damping; a step that does not lower the
        loss is rejected and tried again with more damping.

        Args:
            rule: When to change the damping, and by how much; ``None`` takes the damping as it is.
            gradient: g of what is minimised, ``(P,)``.
            solve: Damping to direction d.
            quadratic: A vector v to ``v^T C v``.
            bend: Corrects a move, given the damping and the promised decrease; the model does not see it.

        Returns:
            The direction; zero if every attempt was rejected.
        """
        if rule is None:
            return solve(float(self.common("damping")))
        params = self.differentiated
        rates = self.rates(params)
        direction, before = torch.zeros_like(gradient), float(self.value)
        for _ in range(rule.attempts):
            damping = float(self.common("damping"))
            try:
                direction = solve(damping)
            except SolverError:
                self.set_damping(rule.raised(damping))
                continue
            move = -rates * direction
            predicted = -float(gradient @ move + 0.5 * quadratic(move))
            if bend is None:
                after = float(self.value_at(unflatten(move, params)))
            else:
                correction, after = bend(move, damping, predicted)
                move = move + correction
                direction = direction - torch.where(rates > 0, correction / rates, 0.0)
            if not math.isfinite(before):
                return torch.full_like(direction, torch.nan)  # no step can be judged by such a loss: refused, aloud
            self.judged = (-predicted, after - before)
            if unseen(predicted, before, after, move.dtype):
                return direction
            if after <= before and predicted > 0:
                self.set_damping(rule.judged(damping, before - after, predicted))
                return direction
            self.set_damping(rule.raised(damping))
        return torch.where(direction.isfinite().all(), 0.0, direction)  # what is not finite is refused, not rejected

    def rates(self, params: list[Tensor]) -> Tensor:
        """The learning rate of each number in some parameters, ``(P,)``."""
        return torch.cat(
            [p.new_full((p.numel(),), float(self._group_of(p)["lr"]), dtype=working_dtype(p)) for p in params]
        )

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups for p in group["params"] if p is parameter)

    def set_damping(self, damping: float) -> None:
        """Give all groups the same damping; it is part of the checkpoints."""
        for group in (self.defaults, *self.param_groups):  # also for groups added later
            group["damping"] = damping
