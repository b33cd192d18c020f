"""The level of the loss: what bounds and dampings that follow the loss are multiples of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from solvers import Damping, LinearOperator
from solvers.precision import working_dtype

#: Weight of the old level, and its largest growth in a step.
DECAY, GROWTH = 0.9, 1.01
#: Smallest damping, as a fraction of the mean eigenvalue: a factored one shifts each factor by 1e-4 of its own.
FLOOR = 1e-8
#: Smallest loss.
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LossLevel:
    r"""The unit of a bound and of a damping that follow the loss.

    .. math:: \ell_t = \min\big(0.9\, \ell_{t-1} + 0.1\, L_t,\; 1.01\, \ell_{t-1}\big), \qquad \ell_0 = L_0

    with :math:`L_t` the loss of the batch, in the scale of C. It falls with the loss, and hardly rises, so that a step
    that has gone too far is not followed by longer ones. It is an average and not the smaller one of it and
    :math:`L_t`, which would follow the lowest batches of a noisy loss. Losses whose values are no distance from a
    perfect fit (densities, losses of one's own) have 1. Where a step does not show its loss, as between updates of the
    statistics, :math:`L_t` is the last one that was seen.

    All are numbers where the parameters lie in the memory of the processor, and 0-d tensors elsewhere, where nobody
    waits for them.

    Attributes:
        mean: :math:`\ell_t`.
        known: Whether it rests on a loss that was seen.
        latest: The loss that was seen last, 0 where none was.
    """

    mean: Tensor | float
    known: Tensor | bool
    latest: Tensor | float

    def saved(self, like: Tensor) -> dict[str, Tensor]:
        """What the next level begins with, ``before`` and ``latest``: 0 where no loss was seen yet.

        Args:
            like: A tensor of the device at which it is kept.
        """
        if isinstance(self.known, Tensor):
            assert isinstance(self.latest, Tensor)
            return {"level": torch.where(self.known, self.mean, 0), "loss": self.latest}
        numbers = {"level": self.mean if self.known else 0.0, "loss": self.latest}
        return {name: torch.tensor(x, dtype=working_dtype(like), device=like.device) for name, x in numbers.items()}

    @classmethod
    def after(cls, before: Tensor | None, loss: Tensor | None, like: Tensor, latest: Tensor | None = None) -> LossLevel:
        """The level after one more step.

        Args:
            before: The level before, 0 where none is known; from NaN comes NaN, which refuses the step.
            loss: Of the step; ``None`` where it was not seen.
            like: A tensor of the device at which it is kept.
            latest: The loss that was seen last, 0 where none was, in whose place ``loss`` comes.
        """
        dtype, device = working_dtype(like), like.device
        if device.type == "cpu":
            largest = torch.finfo(dtype).max
            level, last = (0.0 if x is None else float(x) for x in (before, latest))
            return cls._of_numbers(level, last, None if loss is None else float(loss), largest)
        unknown = torch.zeros((), dtype=dtype, device=device)
        begin, seen = (unknown if x is None else x.to(device, dtype) for x in (before, latest))
        return cls._of_tensors(begin, seen, None if loss is None else loss.to(device, dtype))

    @classmethod
    def _of_tensors(cls, before: Tensor, latest: Tensor, loss: Tensor | None) -> LossLevel:
        """:meth:`after`, without waiting for a device."""
        if loss is not None:
            # At zero nothing is left to do; the smallest number keeps what is divided by it finite.
            loss = loss.clamp(min=SMALLEST)
            latest = torch.where(loss.isfinite(), loss, latest)  # gradients may be although squares of outputs are not
        used = torch.where(latest != 0, latest, torch.where(before != 0, before, 1))
        mean = torch.where(before == 0, used, torch.minimum(before.lerp(used, 1 - DECAY), GROWTH * before))
        return cls(mean, (latest != 0) | (before != 0), latest)

    @classmethod
    def _of_numbers(cls, before: float, latest: float, loss: float | None, largest: float) -> LossLevel:
        """:meth:`after`, without the calls that a device needs."""
        if loss is not None and max(loss, SMALLEST) <= largest:
            latest = max(loss, SMALLEST)
        used = latest or before or 1.0
        mean = min(before + (1 - DECAY) * (used - before), GROWTH * before) if before != 0 else used
        return cls(mean, latest != 0 or before != 0, latest)  # NaN stays: it is the first in min


@dataclass(frozen=True)
class FollowingDamping(Damping):
    r"""A damping whose strength follows the loss, never below what rounding errors of the curvature need.

    .. math:: \lambda = \max\big(\varphi\, \ell,\; 10^{-8} \operatorname{tr} C_b / n_b\big)

    A fitted model has hardly a loss, but all of its curvature, whose factors may be singular.

    Attributes:
        form: The damping with its strength :math:`\varphi\, \ell`.
    """

    form: Damping

    @property
    def strength(self) -> float | Tensor:
        return self.form.strength

    def with_strength(self, value: float | Tensor) -> Self:
        return replace(self, form=self.form.with_strength(value))

    @cached_property
    def _in_float32(self) -> Damping:
        """The form with its strength in the precision of nearly all blocks."""
        return self.form.with_strength(torch.tensor(self.form.strength, dtype=torch.float32))

    def __call__(self, op: LinearOperator) -> LinearOperator:
        """The damped operator of a block."""
        return self._form_for(op)(op)

    def deferred(self, op: LinearOperator) -> LinearOperator:
        return self._form_for(op).deferred(op)

    def _form_for(self, op: LinearOperator) -> Damping:
        """The form, with a strength that is not below the floor of this operator."""
        trace, size = torch.as_tensor(op.trace()), max(1, op.shape[1])
        here = trace.device.type == "cpu" and trace.dtype == torch.float32 and isinstance(self.strength, float)
        if here and self.strength > 2 * FLOOR * float(trace.detach().numpy()) / size:  # far from it: a number tells
            return self._in_float32
        floor = FLOOR * trace / size
        lam = torch.as_tensor(self.strength, dtype=floor.dtype, device=floor.device)
        return self.form.with_strength(torch.maximum(lam, floor))

    def serves_stack(self, op: LinearOperator) -> bool:
        return self.form.serves_stack(op)

    def in_stack(self, op: LinearOperator, floor: float = 0.0) -> LinearOperator:
        return self.form.in_stack(op, max(floor, FLOOR))
