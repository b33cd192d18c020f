"""The losses of a training step: how each enters what is minimised, and what their sum is divided by."""

from __future__ import annotations

from collections.abc import Set
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.passes import Pass
from curvature.estimation.step_collector import Counted
from curvature.losses import Terms


@dataclass
class Weight:
    """How a loss enters what ``backward()`` was called on.

    Attributes:
        factor: What the sum of its terms is multiplied by, 0-d.
        entries: Or a factor for each entry of its output.
    """

    factor: Tensor | None
    entries: Tensor | None = None


@dataclass
class Step:
    """What the statistics of a step consist of so far."""

    batches: int = 0
    reached: set[str] = field(default_factory=set)
    sums: dict[int, Tensor] = field(default_factory=dict)  # total weight of sums, by the output that they are on
    means: bool = False  # calls that were seen are means, or weighted
    absolute: bool = False  # a mean, or weights of single terms, was among the losses
    unscaled: set[int] = field(default_factory=set)  # backward passes with losses of unknown weight: plain means
    signs: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)  # weight and number of terms that gradients at outputs showed
    counted: dict[Pass, Counted] = field(default_factory=dict)  # uses whose inputs were counted
    values: list[Tensor] = field(default_factory=list)  # of losses, times the weight that each has

    def copy(self) -> Step:
        """An independent one."""
        copies = {name: copy(value) for name, value in vars(self).items()}
        return Step(**copies | {"counted": {origin: dict(uses) for origin, uses in self.counted.items()}})

    def note(self, reached: set[str]) -> None:
        """A call of the loss was collected."""
        self.batches += bool(reached)
        self.reached |= reached

    def lose(self, blocks: Set[str], since: tuple[Step, Any] | None = None) -> None:
        """Forget that some blocks were reached, or that they were since a mark."""
        before = Step() if since is None else since[0]
        self.reached -= blocks - before.reached
        for origin, uses in self.counted.items():
            known = before.counted.get(origin, {})
            for key in [key for key in uses if key[0] in blocks]:
                if key in known:
                    uses[key] = known[key]
                else:
                    del uses[key]

    def with_account_of(self, mark: tuple[Step, Any]) -> Step:
        """What was collected by now, with the losses that had been by a mark."""
        return replace(mark[0].copy(), batches=self.batches, reached=self.reached, counted=self.counted)

    def add_sum(self, place: int, weight: Tensor) -> None:
        """Count a sum over terms of this total weight."""
        self.sums[place] = self.sums[place] + weight if place in self.sums else weight

    def share(self, terms: Terms, gradient: Tensor, place: int) -> Weight:
        """How a loss enters, from the gradient that arrived at its value; ``place`` as for :meth:`add_sum`."""
        self.signs.append(torch.stack([(gradient < 0).any(), (gradient > 0).any()]))
        size = gradient.abs()
        self.means |= terms.reduction != "sum"
        if terms.reduction == "mean":
            self.absolute = True
            return Weight(torch.where(terms.total == 0, 0, size / terms.total))  # no term counts: 0, not 0/0
        if terms.reduction == "sum":
            self.add_sum(place, size * terms.total)
            return Weight(size)
        self.absolute = True
        if size.shape != terms.output.shape:
            n, r, c = terms.shape
            size = terms.unrows(size.reshape(n, r, 1).expand(n, r, c))
        return Weight(None, size)

    def counted_in(self, passes: list[Pass]) -> Counted:
        """Uses of these passes whose inputs were counted; may be extended."""
        known = self.counted.setdefault(passes[0], {})
        for origin in passes[1:]:
            known |= self.counted.setdefault(origin, known)
            self.counted[origin] = known
        return known

    def adds_up(self, scale: Tensor | float) -> bool:
        """Whether :meth:`divisor` is the weight of all terms, which adds up over parts of the data."""
        return bool(self.sums) or (not self.unscaled and self._seen_as_sum(scale) is not None)

    def _seen_as_sum(self, scale: Tensor | float) -> Tensor | None:
        """The weight of all terms, where each has a weight of one: a sum, whatever it was written as."""
        if not self.seen or self.means:
            return None
        weights, totals = torch.stack(self.seen).unbind(1)
        is_sum = bool(((weights / scale - 1).abs() < 1e-3).all() & (totals.sum() > 1))
        return (weights * totals).sum() if is_sum else None

    def divisor(self, scale: Tensor | float) -> Tensor | float:
        """What the sums over all terms are divided by."""
        if self.signs and bool(torch.stack(self.signs).any(0).all()):
            raise ValueError(
                "what backward() was called on holds positive and negative multiples of the loss, so its curvature is "
                "not positive semi-definite. Leave the negative part out of the statistics: let only calls of the "
                "optimizer's loss module count, loop=Loop(capture='loss'), and compute it as a function on the output "
                "of the same pass."
            )
        if self.sums and self.absolute:
            raise ValueError(
                "some losses of this step are sums and others means, or weights of single terms, so their curvatures "
                "have no common scale. Use one reduction for all."
            )
        if self.sums:  # the weight of their terms, on the output that has most
            return torch.stack(list(self.sums.values())).max()
        if len(self.unscaled) > 1 or (self.unscaled and self.absolute):
            raise ValueError(
                "this step accumulates several losses of which only gradients at the model's output were seen, and "
                "these do not tell the weight of each (of soft labels, say), so their curvatures have no common scale. "
                "Call the loss module that was given to the optimizer in the loop itself, or let "
                "only its calls count: loop=Loop(capture='loss'). Where a trainer smooths the labels "
                "(label_smoothing_factor=0.1), give the optimizer that loss: nn.CrossEntropyLoss(label_smoothing=0.1)."
            )
        if self.unscaled:
            return 1.0
        found = self._seen_as_sum(scale)
        return scale if found is None else found
