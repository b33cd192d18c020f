"""The calls of loss functions that a backward pass goes through, and how they enter what it was called on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.estimation.live_targets import has_live_target
from curvature.estimation.passes import UnseenLoss
from curvature.model.backward_under_way import begins_with_one, called_on, numbers_called_on
from curvature.model.fully_sharded import is_custom
from curvature.model.graph_nodes import PRODUCTS, below, chain, inputs_of, name_of, node_of, users_first

#: Beginnings of the names of nodes that make other numbers of an output than those that it has.
_TRANSFORMS = (
    *("Sigmoid", "Tanh", "Softmax", "Softplus", "Exp", "Mul", "Div", "Pow", "Neg", "Relu", "Gelu"),
    *("Silu", "Sum", "Mean", "Mv", "LinalgVectorNorm", "Gather", *PRODUCTS),
)


def calls_beside(
    kind: str, ends: Set[Any], known: Set[int], tracked: Set[int]
) -> tuple[dict[Any, list[UnseenLoss]], set[Any] | None, list[Any]]:
    """The functions of one kind, besides known calls, that the backward pass under way goes through to some ends.

    Args:
        kind: Beginning of the name of their nodes; that of a derivative, which a gradient penalty goes through, is not
            meant.
        ends: Nodes below which nothing is looked at.
        known: Sequence numbers of the nodes of calls that are known; likewise.
        tracked: The parameters, by their ``id``.

    Returns:
        The calls, by the ends that have some above; and all ends that it comes to by any way but through known calls
        and other ends, ``None`` where nobody can tell what it was called on, as on an accelerator; and all nodes above.
    """
    roots = called_on()
    if not roots:
        return {}, None, []
    until = lambda node: node in ends or node._sequence_nr() in known  # noqa: E731
    above = list(below(roots, until))
    found: dict[Any, list[UnseenLoss]] = {}
    for node in above:
        if until(node) or not node.name().startswith(kind) or "BackwardBackward" in node.name():
            continue
        ways = list(below([node], until))
        moved = not any(_transforms(one) for one in ways if one is not node and one not in ends)
        moved &= not has_live_target(node, ends, tracked)
        call = UnseenLoss(node, *_reduced(node, roots, until), moved)
        for end in ways:
            if end in ends:
                found.setdefault(end, []).append(call)
    return found, {node for node in above if node in ends}, above


def _transforms(node: Any) -> bool:
    """Whether a node makes other numbers, or a custom function, of which nobody knows."""
    return is_custom(type(node)) or node.name().startswith(_TRANSFORMS)


def _reduced(
    call: Any, roots: list[Any], until: Callable[[Any], bool]
) -> tuple[Literal["mean", "sum"] | None, bool, Tensor | None]:
    """How a loss function enters: its reduction, whether that is added as it is, and what it is alone a multiple of."""
    own = getattr(call, "_saved_reduction", 0)  # of torch: none, mean, sum
    added = partial(_is_added, call, list(map(node_of, roots)), until)
    if own:
        reduction: Literal["mean", "sum"] | None = "mean" if own == 1 else "sum"
        return reduction, added("Add", "Stack", "Sum", "Unsqueeze"), _multiple(call, roots)
    ways: tuple[tuple[Literal["mean", "sum"], str], ...] = (("mean", "Mean"), ("sum", "Sum"))
    reduction = None if added("Add") else next((way for way, name in ways if added("Add", name)), None)
    return reduction, reduction is not None, None


def _is_added(call: Any, starts: list[Any], until: Callable[[Any], bool], *names: str) -> bool:
    """Whether one comes to a node in one way, and through nodes alone whose names begin like these."""
    other = lambda node: not name_of(node).startswith(names) or getattr(node, "_saved_alpha", 1) != 1  # noqa: E731
    if not begins_with_one():
        return False
    ways, found = Counter(starts), users_first(starts, other)
    for node in found:
        for before in [] if other(node) else inputs_of(node):
            ways[before] += ways[node]
    others = [node for node in found if node is not call and other(node)]
    return ways[call] == 1 and call not in below(others, lambda node: node is call or until(node))


def _multiple(call: Any, roots: list[Any]) -> Tensor | None:
    """The sum that the pass was called on, if there is nothing but products and quotients between."""
    numbers = numbers_called_on()
    alone = bool(numbers) and all(_is_multiple(node_of(root), call) for root in roots)
    return reduce(torch.add, numbers) if alone else None


def _is_multiple(start: Any, call: Any) -> bool:
    for node, _ in chain(start):
        if node is call:
            return True
        if not name_of(node).startswith(("Mul", "Div", "ToCopy", "View", "Clone", "Squeeze")):
            return False
    return False
