"""The nodes of an autograd graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Container, Iterable, Iterator, Set
from functools import partial
from types import FrameType
from typing import Any

from torch import Tensor
from torch.autograd import graph


def nodes(tensors: Iterable[Tensor], until: Container[Any] = ()) -> Iterator[Any]:
    """Every node of the graph that leads to some tensors, once.

    Args:
        tensors: Those without a graph have no node.
        until: Nodes below which nothing is looked at.
    """
    return _below([t.grad_fn for t in tensors], until)


def _below(starts: Iterable[Any], until: Container[Any]) -> Iterator[Any]:
    waiting = [node for node in starts if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        if node in until:
            continue
        following = [before for before, _ in node.next_functions if before is not None and before not in seen]
        seen.update(following)
        waiting.extend(following)


def only_way(value: Any, output: Any, targets: Set[Any]) -> bool:
    """Whether all that the backward pass under way brings to some nodes goes through one node, and then another.

    What else it is called on tells, such as a penalty on activations. Where nobody can tell what that is, it is not.

    Args:
        value: The node that is evaluated now.
        output: A node below it, or itself.
        targets: Nodes below that.
    """
    before = set(_below(_called_on(sys._getframe()), {value}))  # an accelerator's pass has a thread of its own: unknown
    if value not in before:
        return False
    others = before - {value} | set(_below([value], {output})) - {output}
    return targets.isdisjoint(others) and output not in before - {value}


def _called_on(frame: FrameType | None) -> list[Any]:
    """The nodes on which the innermost backward pass of this thread was called."""
    while frame is not None and frame.f_code is not graph._engine_run_backward.__code__:
        frame = frame.f_back
    roots = [] if frame is None else frame.f_locals["t_outputs"]
    return [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]


@contextlib.contextmanager
def statistics_given(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Backward passes inside take the statistics of every batch norm in train mode for constants, as in eval mode.

    Args:
        tensors: Those whose graph it is.
    """
    norms = [node for node in nodes(tensors) if "BatchNormBackward" in node.name() and _trains(node)]
    handles = [node.register_hook(partial(_scaled, node)) for node in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
