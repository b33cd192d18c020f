"""Calls of losses as objects: which loss was called, what its terms are, and whether it has one for each example."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from curvature.estimation.batch_loss import refuse_beyond_outputs
from curvature.estimation.live_targets import refuse_live_targets
from curvature.estimation.parts_of_outputs import data_of
from curvature.estimation.passes import Pass, TapedLoss
from curvature.estimation.places import in_their_places
from curvature.estimation.tape import Tape
from curvature.losses import AutogradLoss, BatchDim, Loss, NoCurvatureError, Terms, UnknownLossError, loss_for
from curvature.losses.signals import FisherKind, Signals
from curvature.model.data import refuse_complex
from curvature.model.parameters import Parameters


class CalledLosses:
    """The losses that a tape sees.

    Args:
        tape: The record of the loop.
        loss_fn: The loss module the user calls, or one that describes what is computed elsewhere.
        kind: Of the curvature.
        batch_dim: Axis of the model's output that counts the examples, where it is not the first.

    Attributes:
        own: That loss as an object; ``None`` where it is unknown and the curvature empirical.

    Raises:
        UnknownLossError: If the loss is of unknown type and the curvature is not empirical.
    """

    def __init__(self, tape: Tape, loss_fn: Any, kind: FisherKind, batch_dim: BatchDim) -> None:
        self._tape, self._kind, self._batch_dim = tape, kind, batch_dim
        self.own = self._interpreted(loss_fn)

    def _interpreted(self, loss_fn: Any) -> Loss | None:
        try:
            return loss_for(loss_fn)
        except UnknownLossError:
            if self._kind == "empirical":
                return None
            raise

    def of(self, call: TapedLoss) -> Loss | None:
        """The loss that was called; an empirical Fisher does without."""
        return self.own if call.module is self._tape.loss_module else self._interpreted(call.module)

    def terms(self, loss: Loss, call: TapedLoss, parameters: Parameters) -> Terms:
        """The terms of a call, of which the parameters may change nothing but the outputs."""
        args, kwargs = call.arguments(call.output)
        rest = [a for a in (*args, *kwargs.values()) if a is not call.output]
        refuse_complex(call.output)
        refuse_live_targets([*call.args[1:2], call.kwargs.get("target")], parameters)
        terms = loss.terms(call.output, *rest, as_called=True)
        if isinstance(loss, AutogradLoss):
            refuse_beyond_outputs(terms, parameters)
        return terms

    def others_aggregated(self, passes: list[Pass], calls: list[TapedLoss], parameters: Parameters) -> bool:
        """Whether all other losses of some passes at which gradients may arrive have one term for each example."""
        others = dict.fromkeys(c for origin in passes for c in origin.calls if c not in calls)
        reached = [other for other in others if other.weight is not None or other.alive() is not None]
        places = dict.fromkeys(one.place for one in calls)
        if any(_more_than_the_examples([o for o in (*calls, *reached) if o.place == place]) for place in places):
            return False
        return all(self._aggregated(other, parameters) for other in reached)

    def _aggregated(self, call: TapedLoss, parameters: Parameters) -> bool:
        """Whether a loss has one term for each example; one that tells nothing of its terms has no say."""
        loss = self.of(call)
        if call.aggregated is None and call.tell is not None:
            call.aggregated = call.tell()
        elif call.aggregated is None and loss is not None and not has_no_example(call.output):
            arrived = call.arriving if call.weight is None else call.weight
            number = next((o.recorder.batch for o in call.passes if o.recorder is not None), None)
            with contextlib.suppress(NoCurvatureError), self._tape.own_pass(call.passes, call.output):
                terms = self.terms(loss, call, parameters)
                terms = terms if arrived is None else weighed(terms, arrived)
                terms = in_their_places(terms, call.passes, self._batch_dim)
                call.aggregated = Signals.of(terms, self._kind, batch=number, together=True).aggregated
        return call.aggregated is not False


def _more_than_the_examples(parts: list[TapedLoss]) -> bool:
    """Whether calls on parts of one output see more rows than there are examples: some have several terms."""
    batch = next((o.recorder.batch for one in parts for o in one.passes if o.recorder is not None), None)
    seen = [one.output for one in parts if not one.whole and isinstance(one.output, Tensor) and one.output.dim()]
    rows, known = [], set[Hashable]()
    for z in seen:  # once for each part
        if known.isdisjoint(data := data_of(z)):
            rows.append(len(z))
        known |= data
    return len(rows) > 1 and batch is not None and sum(rows) > batch


def weighed(terms: Terms, gradient: Tensor) -> Terms:
    """The terms of a loss that count by the gradient that arrived at its value: not those of weight zero.

    Masking by hand, ``(loss * mask).sum() / mask.sum()``, picking rows, and ignoring their targets are one loss.
    """
    if gradient.dim() == 0:
        return terms.only(gradient != 0)
    entries = gradient.shape == terms.output.shape
    return terms.only((terms.rows(gradient) != 0).any(-1) if entries else (gradient != 0).reshape(terms.mask.shape))


def has_no_example(output: Any) -> bool:
    """Whether a batch is empty, as that of a process without data: it adds nothing."""
    return isinstance(output, Tensor) and output.numel() == 0
