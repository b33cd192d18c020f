"""The nodes of an autograd graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Set
from dataclasses import dataclass
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
        _below(map(_node, _called_on(sys._getframe())), {value}.__contains__)
    )  # an accelerator's pass has a thread of its own: unknown
    if value not in before:
        return False
    others = before - {value} | set(_below([value], {output}.__contains__)) - {output}
    return targets.isdisjoint(others) and output not in before - {value}


@dataclass(frozen=True)
class UnseenLoss:
    """A call of a loss function that the backward pass under way goes through.

    Attributes:
        node: Its node.
        reduction: Whether its values are averaged or added up, by itself or by the loop.
        adds: Whether this is added to the rest as it is.
        root: What the backward pass was called on, if that is a multiple of this and nothing else.
        moved: Whether it sees an output, or what only views, casts and picked rows made of it, as far as names tell.
    """

    node: Any
    reduction: Literal["mean", "sum"] | None
    adds: bool
    root: Tensor | None
    moved: bool


def calls_beside(kind: str, ends: Set[Any], known: Set[int]) -> tuple[dict[Any, list[UnseenLoss]], set[Any] | None]:
    """The functions of one kind, besides known calls, that the backward pass under way goes through to some ends.

    Args:
        kind: Beginning of the name of their nodes; that of a derivative, which a gradient penalty goes through, is not
            meant.
        ends: Nodes below which nothing is looked at.
        known: Sequence numbers of the nodes of calls that are known; likewise.

    Returns:
        The calls, by the ends that have some above; and all ends that it comes to by any way but through known calls
        and other ends, ``None`` where nobody can tell what it was called on, as on an accelerator.
    """
    roots = _called_on(sys._getframe())
    if not roots:
        return {}, None
    until = lambda node: node in ends or node._sequence_nr() in known  # noqa: E731
    above = list(_below(map(_node, roots), until))
    found: dict[Any, list[UnseenLoss]] = {}
    for node in above:
        if until(node) or not node.name().startswith(kind) or "BackwardBackward" in node.name():
            continue
        between = list(_below([node], until))
        moved = not any(_transforms(one, kind) for one in between if one is not node and one not in ends)
        call = UnseenLoss(node, *_reduced(node, roots), moved)
        for end in between:
            if end in ends:
                found.setdefault(end, []).append(call)
    return found, {node for node in above if node in ends}


#: Beginnings of the names of nodes that make other numbers of an output than those that it has.
_TRANSFORMS = (
    *(
        "Sigmoid",
        "Tanh",
        "Softmax",
        "Softplus",
        "Exp",
        "Mul",
        "Div",
        "Pow",
        "Neg",
        "Relu",
        "Gelu",
        "Silu",
        "Sum",
        "Mean",
    ),
    *("Addmm", "Addbmm", "Baddbmm", "Mm", "Bmm", "Mv", "Linear", "Convolution", "LinalgVectorNorm", "Gather"),
)


def _transforms(node: Any, kind: str) -> bool:
    """Whether a node makes other numbers, or picks some of the last axis, whose terms belong together."""
    name = node.name()
    if name.startswith(("Slice", "Select")):
        axes = len(node._saved_self_sym_sizes)
        return bool(axes > 1 and node._saved_dim % axes == axes - 1)
    return name.startswith(_TRANSFORMS)


def _reduced(call: Any, roots: list[Any]) -> tuple[Literal["mean", "sum"] | None, bool, Tensor | None]:
    """How a loss function enters: its reduction, whether that is added as it is, and what it is alone a multiple of."""
    own = getattr(call, "_saved_reduction", 0)  # of torch: none, mean, sum
    starts = list(map(_node, roots))
    if own:
        adds = call in _reached(starts, "Add", "Stack", "Sum", "Unsqueeze")
        reduction: Literal["mean", "sum"] | None = "mean" if own == 1 else "sum"
    else:
        ways: tuple[tuple[Literal["mean", "sum"], str], ...] = (("mean", "Mean"), ("sum", "Sum"))
        direct = call in _reached(starts, "Add")
        reduction = next((way for way, name in ways if not direct and call in _reached(starts, "Add", name)), None)
        adds = reduction is not None
    return reduction, adds, _multiple(call, roots) if own else None


def _reached(starts: list[Any], *names: str) -> set[Any]:
    """The nodes to which one comes through nodes alone whose names begin like these."""
    ends = lambda node: not node.name().startswith(names) or getattr(node, "_saved_alpha", 1) != 1  # noqa: E731
    return set(_below(starts, ends))


def _multiple(call: Any, roots: list[Any]) -> Tensor | None:
    """What the pass was called on, if there is nothing but products and quotients between."""
    node = _node(roots[0])
    while node is not call:
        after = [before for before, _ in node.next_functions if before is not None]
        if len(after) != 1 or not node.name().startswith(("Mul", "Div", "ToCopy", "View", "Clone", "Squeeze")):
            return None
        node = after[0]
    alone = len(roots) == 1 and isinstance(roots[0], Tensor) and roots[0].numel() == 1
    return roots[0].detach() if alone else None


def _node(root: Any) -> Any:
    return root.grad_fn if isinstance(root, Tensor) else root.node


def _called_on(frame: FrameType | None) -> list[Any]:
    """What the innermost backward pass of this thread was called on: tensors, or edges of the graph."""
    while frame is not None and frame.f_code is not graph._engine_run_backward.__code__:
        frame = frame.f_back
    return [] if frame is None else list(frame.f_locals["t_outputs"])


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
