"""The backward pass under way: what it was called on, and where it goes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Set
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from curvature.model.graph_nodes import below


def threads_in_backward() -> set[int]:
    """The threads of which a backward pass is under way."""
    return {thread for thread, bottom in sys._current_frames().items() if _innermost(bottom) is not None}


def called_on() -> list[Any]:
    """What the innermost backward pass of this thread was called on: tensors, or edges of the graph."""
    frame = _innermost(sys._getframe())
    return [] if frame is None else list(frame.f_locals["t_outputs"])


def numbers_called_on() -> list[Tensor]:
    """The numbers that the innermost backward pass of this thread was called on, times what it began with.

    None where nobody can tell, or where one is no single number.
    """
    return [root.detach() if begin is None else root.detach() * begin.detach() for root, begin in _started()]


def begins_with_one() -> bool:
    """Whether the innermost backward pass of this thread was called on numbers, and begins with ones."""
    started = _started()
    return bool(started) and all(begin is None or bool(begin == 1) for _, begin in started)


def _started() -> list[tuple[Tensor, Tensor | None]]:
    frame = _innermost(sys._getframe())
    if frame is None:
        return []
    roots, begins = frame.f_locals["t_outputs"], frame.f_locals["args"][0]
    if not all(isinstance(root, Tensor) and root.numel() == 1 for root in roots):
        return []
    return list(zip(roots, begins or [None] * len(roots), strict=True))


def _innermost(frame: FrameType | None) -> FrameType | None:
    """The frame of the innermost backward pass among some frame and its callers."""
    while frame is not None and frame.f_code is not graph._engine_run_backward.__code__:
        frame = frame.f_back
    return frame


def only_way(value: Any, output: Any, targets: Set[Any]) -> bool:
    """Whether all that the backward pass under way brings to some nodes goes through one node, and then another.

    What else it is called on tells, such as a penalty on activations. Where nobody can tell what that is, it is not.

    Args:
        value: The node that is evaluated now.
        output: A node below it, or itself.
        targets: Nodes below that.
    """
    # An accelerator's pass has a thread of its own: unknown.
    before = set(below(called_on(), {value}))
    if value not in before:
        return False
    others = before - {value} | set(below([value], {output})) - {output}
    return targets.isdisjoint(others) and output not in before - {value}


def captured(parameters: Iterable[Tensor]) -> bool:
    """Whether the backward pass under way is ``torch.autograd.grad`` with respect to some parameters."""
    for p in parameters:
        if p.requires_grad and p.is_leaf:
            try:
                if torch._C._will_engine_execute_node(graph.get_gradient_edge(p).node):
                    return False
            except RuntimeError as error:  # which torch raises for leaves that it is asked for
                return "autograd.grad" in str(error)
    return False
