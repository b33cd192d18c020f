"""Batch norms in a graph, of which backward passes take the statistics for constants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from curvature.model.graph_nodes import below
from curvature.model.hooks import remove


@contextlib.contextmanager
def statistics_given(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Backward passes inside take the statistics of every batch norm in train mode for constants, as in eval mode.

    Args:
        tensors: Those whose graph it is.
    """
    norms = [node for node in below(tensors) if "BatchNormBackward" in node.name() and _trains(node)]
    handles = [node.register_hook(partial(_scaled, node)) for node in norms]
    try:
        yield
    finally:
        remove(handles)


def _trains(node: Any) -> bool:
    return bool(getattr(node, "_saved_training", False)) and hasattr(node, "_saved_result2")


def _scaled(node: Any, before: tuple[Tensor | None, ...], arrived: tuple[Tensor | None, ...]) -> Any:
    """What the node sends to its input, with the mean and the standard deviation held fixed."""
    gradient, inverse = arrived[0], node._saved_result2
    if gradient is None or before[0] is None:
        return None
    weight = node._saved_weight
    scale = inverse if weight is None else inverse * weight
    return ((gradient * scale.reshape(1, -1, *[1] * (gradient.dim() - 2))).to(before[0].dtype), *before[1:])
