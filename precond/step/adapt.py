"""Adaptation of the damping to how well the quadratic model predicts the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precond.step.options import period as check_period
from solvers.outcome.arguments import fields_of


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Raise the damping where the model promises too much, lower it where the model is trustworthy.

    With the reduction ratio :math:`\rho`, the change of the loss over the change the undamped model predicts:

    .. math:: \lambda \leftarrow a \lambda \text{ if } \rho > \tfrac34, \qquad
        \lambda \leftarrow b \lambda \text{ if } \rho < \tfrac14 \text{ or not a number}

    Args:
        decrease: a, in (0, 1].
        increase: b, at least 1.
        lower: Ratio below which the damping is raised.
        upper: Ratio above which it is lowered.
        minimum: Smallest damping, in units of C.
        relative_minimum: The same as a fraction of the mean eigenvalue of C, where the optimizer keeps an estimate of
            C (layer-based methods). The ratio of a batch that C was estimated from does not carry over to others: it
            would drive the damping down until the run stalls.
        maximum: Largest damping.
        attempts: Steps that may be rejected before the parameters stay where they are; of methods with a closure.
        period: Steps between adaptations, each of which costs a forward pass, and one more under ``next_batch``.
        reject_steps: Take back a step that raises the loss of its own batch, and forget the momentum.
        next_batch: Whether a step is also judged by the batch that comes after it, which had no part in it: at the
            start of the next step, by one forward pass where the former step began. Let :math:`\rho'` be what the loss
            of that batch has fallen by, over what the former batch had promised. Steps that follow the noise of their
            batch have :math:`\rho` near one, and :math:`\rho'` below zero. Then the damping is raised where
            :math:`\rho' < 0`, and lowered only where :math:`\rho' \ge` ``lower`` besides :math:`\rho >` ``upper``.
            ``None`` is yes with ``step_size=QuadraticModel()``, and no elsewhere, where it has no effect.
        relative_maximum: Damping up to which :math:`\rho'` may raise it, as a fraction of the mean eigenvalue of C:
            more shortens the steps and hardly changes their direction. Where no estimate of C is kept, ``maximum``.

    Raises:
        ValueError: If a value is out of range.

    References:
        Marquardt (1963); Martens (2010), section 4.1
    """

    decrease: float = 1 / 3
    increase: float = 3.0
    lower: float = 0.25
    upper: float = 0.75
    minimum: float = 1e-15
    relative_minimum: float = 1e-4
    maximum: float = 1e15
    attempts: int = 12
    period: int = 1
    reject_steps: bool = False
    next_batch: bool | None = None
    relative_maximum: float = 10.0

    def __post_init__(self) -> None:
        """Validate the arguments."""
        fields_of(self)
        if not 0 < self.decrease <= 1 <= self.increase:
            raise ValueError(f"need 0 < decrease <= 1 <= increase; got {self.decrease} and {self.increase}.")
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(f"need 0 < minimum <= maximum; got {self.minimum} and {self.maximum}.")
        if not 0 <= self.relative_minimum < float("inf"):
            raise ValueError(f"relative_minimum must be non-negative and finite; got {self.relative_minimum}.")
        if not self.relative_maximum > 0:
            raise ValueError(f"relative_maximum must be positive; got {self.relative_maximum}.")
        if not self.lower <= self.upper:
            raise ValueError(f"need lower <= upper; got {self.lower} and {self.upper}.")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1; got {self.attempts}.")
        check_period("period", self.period)

    def refuse(self, method: str, *unused: str) -> None:
        """Refuse settings that a method does not use.

        Raises:
            ValueError: Naming the setting and the method.
        """
        for name in unused:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{method}: {name}={getattr(self, name)!r} of its damping_rule has no effect on it.")

    def raised(self, damping: float) -> float:
        """More damping, at least the smallest one."""
        return min(max(damping, self.minimum) * self.increase, self.maximum)

    def judged(self, damping: float, decrease: float, predicted: float, mean: float = 0.0) -> float:
        """The next damping, from the decrease of the loss and the predicted one; see :meth:`adapted`."""
        return self.adapted(damping, decrease / predicted if predicted > 0 else float("nan"), mean)

    def adapted(self, damping: float, ratio: float, mean: float = 0.0) -> float:
        """The next damping.

        Args:
            damping: The present one.
            ratio: The reduction ratio.
            mean: Mean eigenvalue of C, 0 where it is not known.
        """
        if ratio > self.upper:
            return max(damping * self.decrease, self.minimum, min(damping, self.relative_minimum * mean))
        if ratio >= self.lower:
            return damping
        return self.raised(damping)

    def after_next(self, damping: float, ratio: float, next_ratio: float, mean: float = 0.0) -> float:
        """The next damping after a step that its own batch did not raise it for, judged by the next batch too.

        Args:
            damping: The present one.
            ratio: The reduction ratio on the step's own batch, at least ``lower``.
            next_ratio: The decrease of the loss of the next batch over the same promise.
            mean: Mean eigenvalue of C, 0 where it is not known.
        """
        if next_ratio >= self.lower:
            return self.adapted(damping, ratio, mean)
        if next_ratio >= 0:
            return damping
        largest = self.relative_maximum * mean if mean > 0 else self.maximum
        return max(damping, min(self.raised(damping), largest))


def unseen(predicted: float, before: float, after: float, dtype: torch.dtype) -> bool:
    """Whether a promised decrease is too small to be seen in the loss, of a given precision and finite after it."""
    return 0 <= predicted <= 10 * torch.finfo(dtype).eps * abs(before) and after < float("inf")
