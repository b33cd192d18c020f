"""How many examples a loss sees that was called on the outputs of several passes laid side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from curvature.estimation.passes import Pass
from curvature.model.graph_nodes import below, between, inputs_of

#: Beginnings of the names of nodes that lay several tensors side by side.
_JOINS = ("Cat", "Stack")


def number_of_examples(passes: Sequence[Pass], z: Tensor, one: int | None) -> int | None:
    """The examples of all passes that were joined into what a loss saw; of a sum of outputs, those of one.

    Args:
        passes: Those that led to the loss.
        z: What it saw.
        one: Number of examples of the first.
    """
    known = [origin for origin in passes if origin.recorder is not None]
    if len(known) < 2 or z.grad_fn is None:
        return one
    ends = {edge.node: origin for origin in known for edge in origin.edges}
    met: set[Any] = set()
    for node in between([z], ends):
        if node.name().startswith(_JOINS):
            parts = [{id(ends[n]) for n in below([child], ends) if n in ends} for child in inputs_of(node)]
            if len(set().union(*parts)) > max(map(len, parts), default=0):
                met |= set().union(*parts)
    joined = [origin.recorder.batch for origin in known if id(origin) in met and origin.recorder is not None]
    numbers = [number for number in joined if number is not None]
    return one if not joined else sum(numbers) if len(numbers) == len(joined) else None
