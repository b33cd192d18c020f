"""Statistics out of a plain training loop: of gradients as they arrive, and of passes repeated at a step's end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvature.estimation.arriving_statistics import ArrivingStatistics
from curvature.estimation.passes import Pass
from curvature.estimation.repeated_losses import arrivals_again, brought
from curvature.estimation.step import Step


class Statistics(ArrivingStatistics):
    r"""Feeds a collector from a tape.

    A training step's C is the curvature of the very loss whose gradient stands in ``p.grad``:

    .. math:: C = \sum_c w_c \tfrac{1}{T_c} \sum_{t \in c} J_t^\top H_t J_t

    over all calls c of the loss, with the number of terms :math:`T_c` of a mean and the weight :math:`w_c` that the
    value of the call had in what ``backward()`` was called on. Weights of single terms (``reduction="none"``) are kept;
    the scale of a GradScaler is divided out; and the sums of a step (``reduction="sum"``) are divided by their total
    weight, so that they stand for the mean over all of their terms and damping keeps its meaning.

    Args:
        tape: The record of the loop.
        loss_fn: The loss module the user calls, or one that describes what is computed elsewhere.
        collector: Receives the statistics.
        curvature: What is estimated.
        class_dim: Class axis of the output, where it cannot be read off.
        batch_dim: Axis of the model's output that counts the examples, where it is not the first; by key for a sum of
            losses.

    Attributes:
        loss: The loss as an object; ``None`` where it is unknown and the curvature empirical.
        armed: Whether passes are collected.
        batches: Calls of the loss that count by now.
        reached: Names of the blocks they reached.
        generator: Source of the draws of this step.
        level: Value of the losses of the step that was finished last, in the scale of C, 0-d; losses that have no zero
            for a perfect fit count as 1. ``None`` where no call of a loss was seen.
    """

    def finish(self, gradients: Mapping[str, Tensor] | None = None, scale: Tensor | float = 1.0) -> None:
        """Close the step: leave what counts, repeat passes that hide something, and divide by the total weight.

        Args:
            gradients: Gradients of the step by name. If one is nonzero although no statistics reached its parameter,
                not even those of repeated passes, it is used elsewhere.
            scale: Of a GradScaler, in the gradients of the backward passes.

        Raises:
            ValueError: If sums and means were mixed, or losses of both signs.
        """
        gradients = gradients or {}
        self.look_again(self.close(gradients), gradients)
        if self.batches:
            divisor, value = self.step.divisor(scale), self.loss_sum()
            self.settle(divisor, self.reached)
            self.level = None if value is None else value / divisor

    def loss_sum(self) -> Tensor | None:
        """Sum of the losses of the step, each with its weight; ``None`` where nothing has told them."""
        return torch.stack(self.step.values).sum() if self.step.values else None

    def close(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Leave what counts; returns the parameters with a gradient that no statistics explain."""
        self.tape.settle()
        if self.tape.behind is not None:
            raise RuntimeError(
                "a state was loaded between a backward pass and the step, with which the statistics of that pass are "
                "gone, but its gradients still stand in p.grad. Call zero_grad() after load_state_dict() and run the "
                "passes of the step again, or load before the first backward pass of a step."
            )
        self.end()
        self.sealed = set()
        for origin in self.tape.passes:
            if origin.again:
                self.now = set()
                self._repeat(origin)
                self.sealed |= origin.unseen - self.names_of(self.now)
        self.settled = bool(self.batches)
        again = self._automatic and not self.batches and not self.hidden
        return self.missing(gradients) if again else set()

    @property
    def _automatic(self) -> bool:
        return self.tape.mode == "auto" and not self.tape.is_compiled()

    def look_again(self, missing: set[str], gradients: Mapping[str, Tensor]) -> None:
        """Repeat the passes in the open, now and from now on, if they hide the uses of some parameters."""
        if missing:
            self.hidden = True
            self.repeat()
        if self._automatic and self.batches:
            self.elsewhere |= self.missing(gradients) | self.sealed
            self.hidden &= not self.sealed  # repeating its passes does not open them
        self.settled = bool(self.batches)

    def repeat(self) -> None:
        """Collect from the passes of the step once more, with the same draws."""
        self.start_again()
        for origin in self.tape.passes:
            self._repeat(origin)

    def settle(self, weight: Tensor | float, reached: set[str]) -> None:
        """Divide the sums of the blocks that were reached by the total weight of the step."""
        self.collector.settle(weight, reached)

    def divisor(self, scale: Tensor | float) -> tuple[Tensor | float, bool]:
        """What the sums over the terms are divided by, and whether it grows with their number."""
        return self.step.divisor(scale), self.step.adds_up(scale)

    @property
    def explained(self) -> set[str]:
        """Parameters that the statistics of the step are of."""
        return self.names_of(self.reached)

    def again(self, passes: list[Pass], scale: Tensor | float, settles: bool = True) -> bool:
        """Collect from passes of an earlier step, at the parameters' present values; whether there was anything.

        Args:
            passes: As the tape had them.
            scale: Of a GradScaler, in the gradients of their backward passes.
            settles: Whether the sums are divided by their weight, which otherwise waits for those of other processes.
        """
        self.step = Step()
        for origin in passes:
            self._repeat(origin)
        if self.batches and settles:
            self.settle(self.step.divisor(scale), self.reached)
        return self.batches > 0

    def _repeat(self, origin: Pass) -> None:
        """Collect from a pass that is run again."""
        if not brought(origin):
            return
        with self.tape.repeat(origin) as again:
            for call, weight in arrivals_again(self.tape, origin, again):
                self.arrived(call, weight)
            self.arrives_at_output(again)  # no gradient comes that would tell
            arrived = again.gradient
            found = None if arrived is None else self.read(origin, again.output, arrived)
            self.tape.left_out |= again.left_out | origin.left_out
            if found is not None:
                self.take([again], *found, [])
            again.calls = []  # which hold it
