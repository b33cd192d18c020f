"""The nodes of an autograd graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Set
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

#: Beginnings of the names of nodes that pick a part along an axis.
CUTS = ("Slice", "Select", "Split", "Unbind")
#: Of those that lay entries out in other axes, in order.
SHAPES = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
#: Of all that save no tensors: they move entries.
_MOVES = (*CUTS, *SHAPES, *("Alias", "Transpose", "Permute", "Clone", "TBackward", "Narrow", "Expand", "Cat", "Stack"))


def nodes(tensors: Iterable[Tensor], until: Container[Any] = ()) -> Iterator[Any]:
    """Every node of the graph that leads to some tensors, once.

    Args:
        tensors: Those without a graph have no node.
        until: Nodes below which nothing is looked at.
    """
    return below([t.grad_fn for t in tensors], until.__contains__)


def below(starts: Iterable[Any], until: Callable[[Any], bool]) -> Iterator[Any]:
    """Every node below some, these included, once; nothing below those that are ends."""
    waiting = [node for node in starts if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        if until(node):
            continue
        for before, _ in node.next_functions:  # an argument may come twice, as in a square
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)


def users_first(starts: Iterable[Any], until: Callable[[Any], bool]) -> list[Any]:
    """The nodes of :func:`below`, each after all of them that get something from it."""
    users: dict[Any, int] = {}
    for node in (found := list(below(starts, until))):
        for before in () if until(node) else set(inputs_of(node)):
            users[before] = users.get(before, 0) + 1
    out = [node for node in found if node not in users]
    for node in out:  # grows on the way
        for before in () if until(node) else dict.fromkeys(inputs_of(node)):
            users[before] -= 1
            if not users[before]:
                out.append(before)
    return out


def inputs_of(node: Any) -> list[Any]:
    """The nodes that a node gets something from, once for each argument."""
    return [before for before, _ in node.next_functions if before is not None]


def only_way(value: Any, output: Any, targets: Set[Any]) -> bool:
    """Whether all that the backward pass under way brings to some nodes goes through one node, and then another.

    What else it is called on tells, such as a penalty on activations. Where nobody can tell what that is, it is not.

    Args:
        value: The node that is evaluated now.
        output: A node below it, or itself.
        targets: Nodes below that.
    """
    # An accelerator's pass has a thread of its own: unknown.
    before = set(below(map(node_of, called_on()), {value}.__contains__))
    if value not in before:
        return False
    others = before - {value} | set(below([value], {output}.__contains__)) - {output}
    return targets.isdisjoint(others) and output not in before - {value}


def only_moves(start: Any, ends: Set[Any] = frozenset()) -> bool:
    """Whether a node gets the entries of some others, or of leaves, in other places and not changed."""
    between = (node for node in below([start], ends.__contains__) if node not in ends)
    return all(node.name().startswith((*_MOVES, "torch::autograd::AccumulateGrad")) for node in between)


def origin_of_moves(start: Any) -> Any:
    """The node whose entries some node has, moved: itself, if it makes numbers."""
    node = start
    while node is not None and node.name().startswith(_MOVES):
        before = [one for one, _ in node.next_functions if one is not None]
        if len(before) != 1:
            return node  # it lays several side by side
        node = before[0]
    return node


def cut_axis(node: Any) -> tuple[int, int]:
    """The axis along which a node of :data:`CUTS` picks, from 0, and the number of axes of what it picks from."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    axes = len(node._input_metadata[0].shape) + 1 if sizes is None else len(sizes)  # of unbind, or of the others
    return (node._saved_dim - (1 << 64 if node._saved_dim >> 63 else 0)) % axes, axes  # saved without a sign


def node_of(root: Any) -> Any:
    """The node of a tensor, or of an edge."""
    return root.grad_fn if isinstance(root, Tensor) else root.node


def threads_in_backward() -> set[int]:
    """The threads of which a backward pass is under way."""
    found = set()
    for thread, bottom in sys._current_frames().items():
        frame: FrameType | None = bottom
        while frame is not None and frame.f_code is not graph._engine_run_backward.__code__:
            frame = frame.f_back
        if frame is not None:
            found.add(thread)
    return found


def called_on() -> list[Any]:
    """What the innermost backward pass of this thread was called on: tensors, or edges of the graph."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not graph._engine_run_backward.__code__:
        frame = frame.f_back
    return [] if frame is None else list(frame.f_locals["t_outputs"])


def scalar_called_on() -> Tensor | None:
    """The one number that the innermost backward pass of this thread was called on, times what it began with."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not graph._engine_run_backward.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    roots, begins = frame.f_locals["t_outputs"], frame.f_locals["args"][0]
    if len(roots) != 1 or not isinstance(roots[0], Tensor) or roots[0].numel() != 1:
        return None
    begin = begins[0] if begins else None
    return roots[0].detach() if begin is None else roots[0].detach() * begin.detach()


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
