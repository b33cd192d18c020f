"""The nodes of an autograd graph: how their kinds are called, what each gets something from, and walks along these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.model.fully_sharded import is_custom

#: Beginnings of the names of nodes that pick a part along an axis.
CUTS = ("Slice", "Select", "Split", "Unbind")
#: Of those that pick entries, or rows.
PICKS = (*CUTS, "Index", "Gather", "Masked")
#: Of those that lay entries out in other axes, in order.
SHAPES = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
#: Of those that hand entries on in their places, in another dtype maybe.
COPIES = ("ToCopy", "Clone", "Alias")
#: Of all that save no tensors: they move entries.
MOVES = (*CUTS, *SHAPES, *COPIES, *("Transpose", "Permute", "TBackward", "Narrow", "Expand", "Cat", "Stack"))
#: Of products with parameters of a layer.
PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Linear", "Convolution")
#: A node, or a tensor or an edge that has one.
Start = Any
#: Nodes below which nothing is looked at, or what tells them.
Ends = Container[Any] | Callable[[Any], bool]


def asking(ends: Ends) -> Callable[[Any], bool]:
    """What tells whether a node is one of some ends."""
    return ends if callable(ends) else ends.__contains__


def edges_of(node: Any) -> list[tuple[Any, int]]:
    """The nodes that a node gets something from, and the number of that among their results, for each argument."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def inputs_of(node: Any) -> list[Any]:
    """The nodes that a node gets something from, once for each argument."""
    return [before for before, _ in node.next_functions if before is not None]


def below(starts: Iterable[Start], ends: Ends = (), *, with_ends: bool = True) -> Iterator[Any]:
    """Every node that leads to some, these included, once; nothing below those that are ends.

    Args:
        starts: Tensors without a graph have no node. What comes twice is one.
        ends: None: all the graph.
        with_ends: These are among the nodes.
    """
    is_end = asking(ends)
    seen = dict.fromkeys(map(node_of, starts))
    seen.pop(None, None)
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        if is_end(node):
            if with_ends:
                yield node
            continue
        yield node
        for before, _ in node.next_functions:  # an argument may come twice, as in a square
            if before is not None and before not in seen:
                seen[before] = None
                waiting.append(before)


def between(starts: Iterable[Start], ends: Ends) -> Iterator[Any]:
    """The nodes of :func:`below` that are no ends."""
    return below(starts, ends, with_ends=False)


def users_of(nodes: Iterable[Any]) -> dict[Any, list[Any]]:
    """The nodes among some that get something from each, once for each argument."""
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for before in inputs_of(node):
            users.setdefault(before, []).append(node)
    return users


def above(starts: Iterable[Any], users: Mapping[Any, list[Any]], ends: Ends = ()) -> Iterator[Any]:
    """Every node that gets something of some, these included, once; nothing above those that are ends."""
    is_end = asking(ends)
    waiting = list(seen := dict.fromkeys(starts))
    while waiting:
        node = waiting.pop()
        yield node
        for user in () if is_end(node) else users.get(node, ()):
            if user not in seen:
                seen[user] = None
                waiting.append(user)


def users_first(starts: Iterable[Start], ends: Ends = ()) -> list[Any]:
    """The nodes of :func:`below`, each after all of them that get something from it."""
    is_end = asking(ends)
    before = {node: [] if is_end(node) else [*dict.fromkeys(inputs_of(node))] for node in below(starts, is_end)}
    users = Counter(one for inputs in before.values() for one in inputs)
    out = [node for node in before if node not in users]
    for node in out:  # grows on the way
        for one in before[node]:
            users[one] -= 1
            if not users[one]:
                out.append(one)
    return out


def chain(node: Any, number: int = 0) -> Iterator[tuple[Any, int]]:
    """A node with the number of a result, and what that is made of, as long as each is made of one thing alone."""
    while node is not None:
        yield node, number
        before = edges_of(node)
        node, number = before[0] if len(before) == 1 else (None, 0)


def only_moves(start: Any, ends: Set[Any] = frozenset()) -> bool:
    """Whether a node gets the entries of some others, or of leaves, in other places and not changed."""
    names = (*MOVES, "torch::autograd::AccumulateGrad")
    return all(name_of(node).startswith(names) for node in between([start], ends))


def origin_of_moves(start: Any) -> Any:
    """The node whose entries some node has, moved: itself, if it makes numbers, or lays several side by side."""
    node = start
    for node, _ in chain(start):
        if not name_of(node).startswith(MOVES):
            break
    return node


def in_order(z: Tensor, whole: Tensor) -> bool:
    """Whether ``z`` holds all of another tensor, its examples along the first axis, or its rows in their order."""
    if z is whole:
        return True
    if z.numel() != whole.numel() or z.grad_fn is None:
        return False
    transposed = z.dim() == whole.dim() and z.shape[:1] == whole.shape[:1]
    known = (*SHAPES, *COPIES, *(("Transpose", "Permute", "T") if transposed else ()))
    for node, _ in chain(z.grad_fn):
        if node is whole.grad_fn or not name_of(node).startswith(known):
            return node is whole.grad_fn
    return False


def name_of(node: Any) -> str:
    """The name of a node of torch; none of a custom function's, which may begin like any: ``SelectiveScanBackward``."""
    return "" if is_custom(type(node)) else str(node.name())


def kinds(words: str) -> frozenset[str]:
    """Names of operations, as :func:`kind_of` gives them, from a text."""
    return frozenset(words.split())


def kind_of(node: Any) -> str:
    """The name of an operation: ``Slice`` of ``SliceBackward0``; of a custom function none."""
    return name_of(node).partition("Backward")[0]


def shape_of(node: Any, number: int = 0) -> tuple[int, ...]:
    """The shape of a result of a node."""
    return tuple(node._input_metadata[number].shape)


def entries_of_first(node: Any) -> int:
    """Number of entries that the first argument of a node with a graph has."""
    return prod(shape_of(*edges_of(node)[0]))


def kept(node: Any, name: str) -> Any:
    """What a node has saved under a name.

    Raises:
        RuntimeError: If hooks have to bring it back: a checkpoint does so once in a backward pass, for the node itself.
    """
    raw = getattr(node, f"_raw{name}", None)
    if raw is not None and not isinstance(raw, (list, tuple)) and raw.unpack_hook is not None:
        raise RuntimeError("what was saved is not here")
    return getattr(node, name)


def factor_of(node: Any, which: int) -> Tensor | None:
    """What is zero, or False, where a node that multiplies or masks drops one of its arguments; ``None`` of others."""
    kind = kind_of(node)
    if kind == "Mul":
        found = kept(node, "_saved_self" if which else "_saved_other")
        return found if isinstance(found, Tensor) else None
    if kind == "MaskedFill":
        return None if which else ~kept(node, "_saved_mask")
    if kind == "Where":
        shown: Tensor = kept(node, "_saved_condition")
        return ~shown if which else shown
    return None


def signed(number: int) -> int:
    """What a node has saved without a sign."""
    return number - (1 << 64) if number >> 63 else number


def cut_axis(node: Any) -> tuple[int, int]:
    """The axis along which a node of :data:`CUTS` picks, from 0, and the number of axes of what it picks from."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    axes = len(shape_of(node)) + 1 if sizes is None else len(sizes)  # of unbind, or of the others
    return signed(node._saved_dim) % axes, axes


def cuts_columns(node: Any) -> bool:
    """Whether a node of :data:`CUTS` picks along the last of several axes, whose numbers belong together."""
    axis, axes = cut_axis(node)
    return axes > 1 and axis == axes - 1


def node_of(start: Start) -> Any:
    """The node of a tensor, of an edge, or itself."""
    if isinstance(start, Tensor):
        return start.grad_fn
    return start.node if isinstance(start, GradientEdge) else start
