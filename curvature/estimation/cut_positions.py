"""Which positions of a layer's use the rest of a model picks, or masks before it pools them, by the graph alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.layers.site import Site
from curvature.model.graph_nodes import CUTS, SHAPES, below, cut_axis

#: Beginnings of the names of nodes that pool along an axis.
_POOLS = ("Sum", "Mean", "Max", "Amax", "Logsumexp")
#: Of those that pick.
_PICKS = (*CUTS, "Index", "Gather", "Bmm")
#: Of those that lay entries out in other axes.
_RESHAPES = (*SHAPES, "Expand", "Reshape")
#: Of those that work on each position by itself: on entries, and along later axes.
_ENTRYWISE = (
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Exp", "Log", "Clamp", "MaskedFill", "Where"),
    *("Tanh", "Sigmoid", "Relu", "Gelu", "Silu", "Elu", "Leaky", "Softplus", "Threshold", "Hard", "Softmax"),
    *("NativeLayerNorm", "FusedRms", "NativeDropout", "Clone", "Alias", "ToCopy", "Mm", "Linear", "TBackward"),
    *("Mean", "Sum"),
)
#: Of those whose result sums over positions of all that they get but the first.
_LOOKS = ("Bmm", "ScaledDotProduct")
#: Of those that put positions in another order.
_TURNS = ("Flip", "Roll")
#: The axis of positions in ``(n, R, ...)``.
_AXIS = 1


def picked_positions(sites: Iterable[Site], output: Tensor) -> dict[int, Tensor]:
    """Positions of some uses that what follows picks, ``(n or 1, s)`` by use; none for uses of which it takes all.

    A classification token, the last token of a text, or pooling with a mask leave out positions as a loss leaves out
    terms. What lies between may still lead from a position that is not picked to the output (attention does), which
    only a signal tells. Read are cuts and indices along the second of three axes or more, and masks, one number for
    each position, right before pooling; of passes with checkpoints cuts alone, since what a checkpoint has saved may be
    asked for once. Single steps of what a transposition made time-major are cuts as well.

    Args:
        sites: The uses.
        output: Of the model.
    """
    sites = list(sites)
    by_node = {s.edge.node: s for s in sites if len(s.output_shape) == 3 and not s.operation.startswith("conv")}
    if output.grad_fn is None or not by_node:
        return {}
    found = _masks(output, CUTS if any(site.packed for site in sites) else _PICKS)
    out: dict[int, Tensor] = {}
    for site in by_node.values():
        mask = found.get(site.edge.node)
        n, s = (site.output_shape[1], site.output_shape[0]) if site.layout.time_major else site.output_shape[:2]
        if mask is not None and mask.shape[1] == s and mask.shape[0] in (1, n) and not bool(mask.all()):
            out[id(site)] = mask
    return out


def _masks(output: Tensor, picks: tuple[str, ...]) -> dict[Any, Tensor | None]:
    """What is picked of the output of each node, ``None`` for all, on any way from a node to the output."""
    reached: dict[Any, Tensor | None] = {output.grad_fn: None}
    numbers: dict[Any, set[int]] = {}
    pooled: set[Any] = set()
    nodes = _users_first(output.grad_fn)
    turns = any(_puts_time_first(node) for node in nodes)  # then nobody knows along which axis something is flipped
    for node in nodes:
        name, given = node.name(), numbers.get(node, {0})
        for which, (child, number) in enumerate(node.next_functions):
            if child is None:
                continue
            mask = reached[node]
            if name.startswith(picks) or (node in pooled and picks is _PICKS):
                shape = child._input_metadata[number].shape
                try:
                    mask = _picked(node, name, which, given, mask, shape, node in pooled)
                except RuntimeError:  # what it saved is gone, or was changed since
                    mask = None
                mask = mask if mask is None else mask.to(output.device)
            elif mask is not None and turns and name.startswith(_TURNS):
                mask = None
            elif mask is not None:
                mask = _through(node, name, which, child._input_metadata[number].shape, mask)
            numbers.setdefault(child, set()).add(number)
            if name.startswith(_POOLS):
                pooled.add(child)
            reached[child] = _either(reached[child], mask) if child in reached else mask
    return reached


def _users_first(start: Any) -> list[Any]:
    """Every node below one, each after all that get something from it."""
    users: dict[Any, int] = {}
    for node in below([start], frozenset().__contains__):
        for child in {child for child, _ in node.next_functions if child is not None}:
            users[child] = users.get(child, 0) + 1
    ready, out = [start], []
    while ready:
        node = ready.pop()
        out.append(node)
        for child in {child for child, _ in node.next_functions if child is not None}:
            users[child] -= 1
            if not users[child]:
                ready.append(child)
    return out


def _through(node: Any, name: str, which: int, before: Sequence[int], mask: Tensor) -> Tensor | None:
    """What is picked of one of those that a node gets, of some shape, which does not pick by itself."""
    if name.startswith(_LOOKS) and which:  # of keys and values a signal alone tells which are looked at
        return mask.new_zeros(1, before[-2])
    if name.startswith(_TURNS):
        return _turned_back(node, name, mask, len(before)) if len(before) == 3 and before[1] == mask.shape[1] else None
    return mask if _keeps_positions(node, name, before) else None


def _turned_back(node: Any, name: str, mask: Tensor, axes: int) -> Tensor | None:
    """What is picked of a tensor, where it is picked behind a flip or a roll along some of its axes."""
    dims = [_signed(axis) % axes for axis in node._saved_dims]
    if name.startswith("Flip"):
        return mask.flip([axis for axis in dims if axis <= _AXIS])
    if not dims:
        return None  # it is rolled as one row
    for shift, axis in zip(node._saved_shifts, dims, strict=True):
        mask = mask.roll(-_signed(shift), axis) if axis <= _AXIS else mask
    return mask


def _one_of_time(node: Any, name: str, which: int, numbers: set[int]) -> Tensor | None:
    """The positions picked where a node takes single ones of ``(R, n, ...)``, right behind ``(n, R, ...)``."""
    child, number = node.next_functions[which]
    shape = child._input_metadata[number].shape
    if not child.name().startswith(("Transpose", "Permute")) or _moved(child, len(shape)) != {0, 1}:
        return None
    found = [_places(node, name, k, shape[0]) for k in sorted(numbers)]
    if any(len(places) != 1 for places in found):
        return None  # of several, those that are picked next lie along the first axis
    return _scattered([places[0] for places in found], shape[0], None)


def _keeps_positions(node: Any, name: str, before: Sequence[int]) -> bool:
    """Whether the positions of what a node gets are those of what it gives, as far as names and shapes tell."""
    shape = node._input_metadata[0].shape
    if name.startswith(("Transpose", "Permute")):  # as attention does: examples with positions, or positions with heads
        moved = _moved(node, len(shape))
        return not moved & {0, 1} or moved == {0, 1} or (moved == {1, 2} and len(shape) == 4)
    if name.startswith(_RESHAPES):
        two = sorted((tuple(before), tuple(shape)), key=len)
        joined = len(two[0]) < len(two[1]) and two[0][0] == math.prod(two[1][:2])  # examples with positions, or heads
        return (joined and two[0][1] in two[1][2:]) or tuple(before[:2]) == tuple(shape[:2])
    return name.startswith((*_ENTRYWISE, *_LOOKS))  # of these the rows of a product, the queries


def _puts_time_first(node: Any) -> bool:
    """Whether a node swaps the first two axes."""
    return node.name().startswith(("Transpose", "Permute")) and bool(
        _moved(node, len(node._input_metadata[0].shape)) & {0}
    )


def _moved(node: Any, axes: int) -> set[int]:
    """The axes that a transposition or a permutation puts elsewhere."""
    if node.name().startswith("Permute"):
        return {k for k, axis in enumerate(node._saved_dims) if k != _signed(axis) % axes}
    return {_signed(node._saved_dim0) % axes, _signed(node._saved_dim1) % axes}


def _signed(number: int) -> int:
    """What was saved without a sign."""
    return number - (1 << 64) if number >> 63 else number


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a | b if a is not None and b is not None and a.shape[1] == b.shape[1] else None


def _picked(
    node: Any, name: str, which: int, numbers: set[int], mask: Tensor | None, shape: Sequence[int], pooled: bool
) -> Tensor | None:
    """What a node picks of one of those it gets, given what is picked of its outputs with some numbers."""
    if len(shape) < 3:
        return mask
    n, length = shape[:2]
    if name.startswith(CUTS):
        if cut_axis(node)[0] != _AXIS:
            return _one_of_time(node, name, which, numbers) if cut_axis(node)[0] == 0 and mask is None else mask
        return _scattered([i for k in sorted(numbers) for i in _places(node, name, k, length)], length, mask)
    if name.startswith("IndexSelect") and node._saved_dim % len(shape) == _AXIS:
        return _scattered((node._saved_index % length).tolist(), length, mask)
    if name.startswith("IndexBackward"):
        rows, columns = (*node._saved_indices, None)[:2]
        if rows is not None and rows.dtype == torch.bool and rows.shape == (n, length):
            return rows
        if columns is None or columns.dtype == torch.bool:
            return mask
        if rows is None:
            return _scattered((columns.flatten() % length).tolist(), length, mask)
        out = torch.zeros(n, length, dtype=torch.bool, device=columns.device)
        out[rows, columns] = True
        return out
    if name.startswith("Gather") and node._saved_dim % len(shape) == _AXIS:
        places = node._saved_index.flatten(2)
        out = places.new_zeros(n, length, places.shape[2], dtype=torch.bool).scatter_(1, places, True)
        return out.any(2)
    if name.startswith("Bmm") and which == 1:  # sums over positions, with weights that are known for a single one
        if node._input_metadata[0].shape[1] == 1:
            return node._saved_self[:, 0] != 0
        return mask if mask is None else mask.new_zeros(1, length)
    if pooled and name.startswith(("Mul", "MaskedFill", "Where")):
        own = _one_for_each(_factor(node, name, which), n, length, len(shape))
        return own if mask is None or own is None else own & mask if mask.shape[1] == length else own
    return mask


def _places(node: Any, name: str, number: int, length: int) -> Sequence[int]:
    """The positions that are the output of a node with some number."""
    if name.startswith("Slice"):
        return range(length)[_signed(node._saved_start) : _signed(node._saved_end) : node._saved_step]
    if name.startswith("Select"):
        return [_signed(node._saved_index) % length]
    if name.startswith("Unbind"):
        return [number]
    size = getattr(node, "_saved_split_sizes", None) or node._saved_split_size
    if isinstance(size, int):
        return range(length)[number * size : (number + 1) * size]
    return range(length)[sum(size[:number]) : sum(size[: number + 1])]


def _scattered(places: Sequence[int], length: int, mask: Tensor | None) -> Tensor:
    """Positions of the whole from positions of a part, of which those in the mask are picked."""
    part = torch.ones(1, len(places), dtype=torch.bool) if mask is None or mask.shape[1] != len(places) else mask
    out = part.new_zeros(len(part), length)
    out[:, places] = part
    return out


def _factor(node: Any, name: str, which: int) -> Tensor | None:
    """A tensor that is zero where one of those that a node gets is dropped."""
    if name.startswith("MaskedFill"):
        return ~node._saved_mask
    if name.startswith("Where"):
        return ~node._saved_condition if which else node._saved_condition
    return node._saved_self if which else node._saved_other


def _one_for_each(factor: Tensor | None, n: int, length: int, axes: int) -> Tensor | None:
    """``(n or 1, R)`` of a factor that is one number for each position; ``None`` for others."""
    if factor is None or factor.dim() > axes:
        return None
    factor = factor[(None,) * (axes - factor.dim())]
    if factor.shape[1] != length or factor.shape[0] not in (1, n):
        return None
    each = all(size == 1 or stride == 0 for size, stride in zip(factor.shape[2:], factor.stride()[2:], strict=True))
    return factor.flatten(2)[..., 0] != 0 if each else None
