"""What was found out about the structure of a pass, remembered for passes of the same structure.

Whether the recorded uses explain the gradients, and whether each example's rows hear of that example alone, follows
from the autograd graph: from its operations, its shapes and where the parameters enter. It is tried out, by further
backward passes, on the first pass with a graph, and taken over for later ones with an equal graph. A graph that moves
rows according to their values (a sort, experts that pick their tokens) or that holds operations PyTorch does not know
may do something else each time, and is tried out in every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from curvature.model.fully_sharded import is_custom

#: Nodes whose rows are picked, moved or merged by values, by the beginnings of their names.
BY_VALUE = (
    *("Cummax", "Cummin", "Gather", "Index", "Kthvalue", "MaskedScatter", "MaskedSelect", "Median"),
    *("Mode", "Nanmedian", "Put", "RepeatInterleave", "Scatter", "SegmentReduce", "Sort", "Take", "Topk"),
    "Unique",
)
_VIEWS = {
    *("T", "Transpose", "Permute", "View", "ReshapeAlias", "Expand", "Slice", "Select", "Squeeze"),
    *("Unsqueeze", "ToCopy"),
}
#: Structures remembered for one set of parameters; inputs of many different shapes make many.
MOST = 64

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def graph(output: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Hashable, dict[Any, int]] | None:
    """A value that equal graphs have in common, and the number of each node; ``None`` if values steer what it does.

    Args:
        output: What the graph leads to.
        parameters: Tensors that are told apart by their names where they enter.
    """
    names = {id(p): name for name, p in parameters.items()}
    numbers: dict[Any, int] = {output.grad_fn: 0}
    waiting: list[Any] = [output.grad_fn]
    entries = []
    for node in waiting:  # grows on the way
        name = node.name()
        if name.startswith(BY_VALUE) or is_custom(type(node)):
            return None
        before: list[tuple[int, int] | None] = []
        for earlier, slot in node.next_functions:
            if earlier is None:
                before.append(None)
                continue
            if earlier not in numbers:
                numbers[earlier] = len(numbers)
                waiting.append(earlier)
            before.append((numbers[earlier], slot))
        leaf = getattr(node, "variable", None)
        entries.append(
            (
                name,
                tuple(tuple(m.shape) for m in node._input_metadata),
                tuple(before),
                None if leaf is None else names.get(id(leaf)),
                getattr(node, "_saved_training", None),  # one node serves both modes of a batch norm
            )
        )
    return tuple(entries), numbers


def custom_functions(output: Tensor, parameter: Tensor) -> list[str]:
    """Names of the custom ``autograd.Function`` classes that a parameter, or a view of it, goes into."""
    users: dict[Any, list[Any]] = {}
    waiting: list[Any] = [output.grad_fn]
    for node in waiting:  # grows on the way
        for earlier, _ in node.next_functions:
            if earlier is not None:
                if earlier not in users:
                    waiting.append(earlier)
                users.setdefault(earlier, []).append(node)
    seen = [node for node in waiting if getattr(node, "variable", None) is parameter]
    found: dict[str, None] = {}
    for node in seen:  # grows as well
        for user in users.get(node, ()):
            name = user.name().partition("Backward")[0]
            if is_custom(type(user)):
                found[name] = None
            elif name in _VIEWS and user not in seen:
                seen.append(user)
    return list(found)


def recall(parameters: Mapping[str, Tensor], key: Hashable | None, look: Callable[[], set[str]]) -> set[str]:
    """What was found for these parameters under ``key``, or what ``look`` finds now; ``None`` is never remembered."""
    if key is None:
        return look()
    known: dict[Hashable, frozenset[str]] = _known.setdefault(next(iter(parameters.values())), {})
    if key not in known:
        if len(known) >= MOST:
            known.clear()
        known[key] = frozenset(look())
    return set(known[key])
