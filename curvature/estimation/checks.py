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
from curvature.model.graph_nodes import above, below, kind_of, kinds, users_of

#: Nodes whose rows are picked, moved or merged by values, by the beginnings of their names.
BY_VALUE = (
    *("Cummax", "Cummin", "Gather", "Index", "Kthvalue", "MaskedScatter", "MaskedSelect", "Median", "Mode"),
    *("Nanmedian", "Put", "RepeatInterleave", "Scatter", "SegmentReduce", "Sort", "Take", "Topk", "Unique"),
)
_VIEWS = kinds("T Transpose Permute View ReshapeAlias Expand Slice Select Squeeze Unsqueeze ToCopy")
#: Structures remembered for one set of parameters; inputs of many different shapes make many.
MOST = 64

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def graph(output: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Hashable, dict[Any, int]] | None:
    """A value that equal graphs have in common, and the number of each node; ``None`` if values steer what it does.

    Args:
        output: What the graph leads to.
        parameters: Tensors that are told apart by their names where they enter.
    """
    numbers: dict[Any, int] = {}
    for number, node in enumerate(below([output])):
        if node.name().startswith(BY_VALUE) or is_custom(type(node)):
            return None
        numbers[node] = number
    names = {id(p): name for name, p in parameters.items()}
    entries = tuple(
        (
            node.name(),
            tuple(tuple(m.shape) for m in node._input_metadata),
            tuple((numbers.get(before), slot) for before, slot in node.next_functions),
            names.get(id(getattr(node, "variable", None))),
            getattr(node, "_saved_training", None),  # one node serves both modes of a batch norm
        )
        for node in numbers
    )
    return entries, numbers


def custom_functions(output: Tensor, parameter: Tensor) -> list[str]:
    """Names of the custom ``autograd.Function`` classes that a parameter, or a view of it, goes into."""
    found = list(below([output]))
    leaves = [node for node in found if getattr(node, "variable", None) is parameter]
    users = above(leaves, users_of(found), lambda node: node not in leaves and kind_of(node) not in _VIEWS)
    return list(dict.fromkeys(node.name().partition("Backward")[0] for node in users if is_custom(type(node))))


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
