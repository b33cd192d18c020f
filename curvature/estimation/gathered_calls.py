"""Calls of the loss on parts of one output, such as one for each step of time, that are sent back together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.passes import Pass, TapedLoss
from curvature.estimation.step import Weight
from curvature.losses import Terms
from curvature.losses.picked import ApartTerms, GatheredTerms, PickedTerms
from curvature.model.backward_hooks import ours
from curvature.model.graph_nodes import only_moves, origin_of_moves


class GatheredCalls:
    """Calls on parts of an output of a pass, with their weights, until the gradient arrives where the parts come from.

    Every call sends passes of its own through the whole graph: for calls step by step in time, that is as many as their
    number times the length of it. Autograd comes to what was computed last first, so that all calls that came after the
    outputs have been heard of by then; others are sent as they come.
    """

    def __init__(self) -> None:
        self._found: dict[Pass, list[tuple[Tensor, Terms, TapedLoss]]] = {}
        self._handles: dict[Any, Any] = {}  # by the nodes that wait

    @staticmethod
    def may_take(passes: list[Pass], call: TapedLoss) -> bool:
        """Whether there are other calls on parts, and a call sees what only moves the entries of something."""
        (origin, *others), whole = passes, passes[0].output
        if others or not any(other is not call and other.place == call.place for other in origin.calls):
            return False
        if call.whole or not isinstance(call.output, Tensor):
            return False
        if isinstance(whole, Tensor) and whole.requires_grad and whole.grad_fn is not origin.end:
            return False
        return len([one for one in call.passes if one.recorder is not None]) == 1

    def take(self, origin: Pass, terms: Terms, weight: Tensor, call: TapedLoss, ready: Callable[..., None]) -> bool:
        """Keep a call, if its terms lie on rows as those do that are kept; whether it is.

        Args:
            origin: The pass.
            terms: Of the call.
            weight: What their sum is multiplied by.
            call: The call.
            ready: To be called before the graph below goes: a hook.
        """
        found = self._found.get(origin, [])
        node = call.output.grad_fn  # what a node has saved is gone once the gradient has passed it
        node = origin.end if only_moves(node, {origin.end}) else origin_of_moves(node)
        if node is None or (found and not _alike(found[0][1], terms)):
            return False
        if node not in self._handles:
            self._handles[node] = ours(node.register_prehook(ready))
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
        picked = [(weight, terms) for weight, terms, _ in found if type(terms) is PickedTerms]
        joined = GatheredTerms(picked) if picked else ApartTerms([(weight, terms) for weight, terms, _ in found])
        return joined, Weight(torch.ones_like(found[0][0])), calls

    def clear(self) -> None:
        """Forget them."""
        for handle in self._handles.values():
            handle.remove()
        self._found, self._handles = {}, {}


def _alike(one: Terms, other: Terms) -> bool:
    """Whether terms are both on rows of an output, or both on outputs of their own, of as many examples."""
    return (type(one) is PickedTerms) == (type(other) is PickedTerms) and one.mask.shape == other.mask.shape
