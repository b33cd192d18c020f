"""The nodes of an autograd graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Set
from functools import partial
from types import FrameType
from typing import Any, Literal

from torch import Tensor
from torch.autograd import graph


def nodes(tensors: Iterable[Tensor], until: Container[Any] = ()) -> Iterator[Any]:
    """Every node of the graph that leads to some tensors, once.

    Args:
        tensors: Those without a graph have no node.
        until: Nodes below which nothing is looked at.
    """
    return _below([t.grad_fn for t in tensors], until.__contains__)


def _below(starts: Iterable[Any], until: Callable[[Any], bool]) -> Iterator[Any]:
    waiting = [node for node in starts if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        if until(node):
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
    before = set(
        _below(_called_on(sys._getframe()), {value}.__contains__)
    )  # an accelerator's pass has a thread of its own: unknown
    if value not in before:
        return False
    others = before - {value} | set(_below([value], {output}.__contains__)) - {output}
    return targets.isdisjoint(others) and output not in before - {value}


def calls_beside(kind: str, ends: Set[Any], known: Set[int]) -> dict[Any, list[Any]]:
    """The functions of one kind, besides known calls, that the backward pass under way goes through to some ends.

    Where nobody can tell what the pass was called on, as on an accelerator, there is none.

    Args:
        kind: Beginning of the name of their nodes; that of a derivative, which a gradient penalty goes through, is not
            meant.
        ends: Nodes below which nothing is looked at.
        known: Sequence numbers of the nodes of calls that are known; likewise.

    Returns:
        Their nodes, by the ends that have some above.
    """
    until = lambda node: node in ends or node._sequence_nr() in known  # noqa: E731
    above = _below(_called_on(sys._getframe()), until)
    found: dict[Any, list[Any]] = {}
    for call in [node for node in above if not until(node) and _is_call(node.name(), kind)]:
        for end in [node for node in _below([call], until) if node in ends]:
            found.setdefault(end, []).append(call)
    return found


def reduction_of(call: Any) -> Literal["mean", "sum", "none"]:
    """How a loss function enters what the backward pass under way was called on.

    Its values are averaged or added up, by itself or by the loop, and this is added to the rest; or, with ``"none"``,
    they are multiplied or come by another way.
    """
    alone = call in _reached_by("Add")
    own = getattr(call, "_saved_reduction", 0)  # of torch: none, mean, sum
    if own:
        return ("mean", "sum")[own - 1] if alone else "none"
    ways: tuple[tuple[Literal["mean", "sum"], str], ...] = (("mean", "Mean"), ("sum", "Sum"))
    return next((way for way, name in ways if not alone and call in _reached_by("Add", name)), "none")


def _reached_by(*names: str) -> set[Any]:
    """The nodes to which the backward pass under way comes through nodes alone whose names begin like these."""
    ends = lambda node: not node.name().startswith(names) or getattr(node, "_saved_alpha", 1) != 1  # noqa: E731
    return set(_below(_called_on(sys._getframe()), ends))


def _is_call(name: str, kind: str) -> bool:
    return name.startswith(kind) and "BackwardBackward" not in name


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
