"""Calls of the loss on parts of one output, such as one for each step of time, that are sent back together."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.estimation.passes import Pass, TapedLoss
from curvature.estimation.step import Weight
from curvature.losses import Terms
from curvature.losses.picked import GatheredTerms, PickedTerms
from curvature.model.graph_nodes import only_moves


class GatheredCalls:
    """Calls on parts of the output of a pass, with their weights, until the gradient arrives at the output.

    Every call sends passes of its own through the whole graph: for calls step by step in time, that is as many as their
    number times the length of it.
    """

    def __init__(self) -> None:
        self._found: dict[Pass, list[tuple[Tensor, PickedTerms, TapedLoss]]] = {}

    @staticmethod
    def may_take(passes: list[Pass], call: TapedLoss) -> bool:
        """Whether there are other calls on parts, and the gradient at the output of the pass is heard of after all."""
        (origin, *others), whole = passes, passes[0].output
        if others or not any(other is not call and other.place == call.place for other in origin.calls):
            return False
        heard = origin.at_output is not None and isinstance(whole, Tensor) and not call.whole
        if (
            not heard
            or not isinstance(call.output, Tensor)
            or not whole.requires_grad
            or whole.grad_fn is not origin.end
        ):
            return False
        if not only_moves(call.output.grad_fn, {origin.end}):
            return False  # the saved tensors between are gone once the gradient has passed
        return len([one for one in call.passes if one.recorder is not None]) == 1

    def take(self, origin: Pass, terms: Terms, weight: Tensor, call: TapedLoss) -> bool:
        """Keep a call, if its terms lie on rows as those do that are kept; whether it is."""
        found = self._found.get(origin, [])
        if type(terms) is not PickedTerms or (found and found[0][1].mask.shape != terms.mask.shape):
            return False
        self._found[origin] = [*found, (weight, terms, call)]
        return True

    def pop(self, origin: Pass) -> tuple[Terms, Weight, list[TapedLoss]] | None:
        """The calls of a pass as one, with its weight; ``None`` where there are none."""
        found = self._found.pop(origin, [])
        if not found:
            return None
        calls = [call for *_, call in found]
        if len(found) == 1:
            return found[0][1], Weight(found[0][0]), calls
        return (
            GatheredTerms([(weight, terms) for weight, terms, _ in found]),
            Weight(torch.ones_like(found[0][0])),
            calls,
        )

    def clear(self) -> None:
        """Forget them."""
        self._found.clear()
