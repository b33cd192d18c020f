"""Which entries are reached of what a node moves, cuts, picks by index, lays side by side, or adds up along axes.

A rule gets the node, the number of one of the tensors that the node gets, what is reached of the one that it gives
(``None`` for all), and the shape of the former. Entries are held as in :mod:`curvature.estimation.reached_entries`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.model.graph_nodes import kept, kinds, shape_of, signed

#: What is reached of the tensors that a node gives, by number.
Given = dict[int, Tensor | None]
Rule = Callable[[Any, int, Tensor | None, Sequence[int]], Tensor | None]


def spread(after: Tensor, shape: Sequence[int]) -> Tensor:
    """Entries of what was broadcast to a result."""
    after = after.any(list(range(after.dim() - len(shape))), keepdim=False) if after.dim() > len(shape) else after
    alike = [k for k, size in enumerate(shape) if size == 1 and after.shape[k] > 1]
    return after.any(alike, keepdim=True) if alike else after


def along(after: Tensor, *axes: int) -> Tensor:
    """Entries of what was mixed along some axes, which stay."""
    wide = [axis for axis in axes if after.shape[axis] > 1]
    return after.any(wide, keepdim=True) if wide else after


def _full(size: Sequence[int]) -> Tensor:
    return torch.ones([1] * len(size), dtype=torch.bool)


def _axis(node: Any, axes: int) -> int:
    return signed(node._saved_dim) % max(axes, 1)


def cut(node: Any, given: Given, shape: Sequence[int]) -> Tensor:
    """What is reached of a tensor that a node of :data:`CUTS` gets: slices, single ones, splits."""
    axis, name = _axis(node, len(shape)), node.name()
    parts = []
    for number, after in given.items():
        after = _full(shape_of(node, number)) if after is None else after
        if name.startswith(("Select", "Unbind")):
            after = after.unsqueeze(axis)
        places = _places(node, name, number, shape[axis])
        parts.append((after, places))
    device = next((after.device for after, _ in parts if after.numel() > 1), None)
    out = torch.zeros([1] * len(shape), dtype=torch.bool, device=device)
    for after, places in parts:
        after = after.to(out.device)
        wide = [max(a, b) for a, b in zip(out.shape, after.shape, strict=True)]
        wide[axis] = shape[axis]
        out = out.expand(wide).clone()
        out[(slice(None),) * axis + (places,)] |= after
    return out


def _places(node: Any, name: str, number: int, length: int) -> slice:
    """The places along the axis that are the output of a node with some number."""
    if name.startswith("Slice"):
        start, end, _ = slice(signed(node._saved_start), signed(node._saved_end)).indices(length)
        return slice(start, end, node._saved_step)
    if name.startswith("Select"):
        return slice(k := signed(node._saved_index) % length, k + 1)
    if name.startswith("Unbind"):
        return slice(number, number + 1)
    size = getattr(node, "_saved_split_sizes", None) or node._saved_split_size
    if isinstance(size, int):
        return slice(number * size, (number + 1) * size)
    return slice(sum(size[:number]), sum(size[: number + 1]))


def _laid_out(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The same entries in order, in other axes."""
    sizes = shape_of(node)
    if math.prod(sizes) == 0 or math.prod(shape) == 0:
        return None
    groups, i, j = [], 0, 0
    while i < len(sizes) or j < len(shape):  # the least runs of axes of the same number of entries
        first, second = i, j
        i, j = i + (i < len(sizes)), j + (j < len(shape))
        while (a := math.prod(sizes[first:i])) != (b := math.prod(shape[second:j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        groups.append((first, i, second, j))
    wide, narrow = list(after.shape), list[int]()
    for first, end, second, last in groups:
        if any(size > 1 for size in after.shape[first:end]):
            wide[first:end], new = sizes[first:end], shape[second:last]
        else:
            new = [1] * (last - second)
        narrow += new
    return after.expand(wide).reshape(narrow)


def _turned(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    """Axes in another order."""
    if node.name().startswith("Permute"):
        dims = [signed(axis) % len(shape) for axis in node._saved_dims]
        return after.permute([dims.index(k) for k in range(len(dims))])
    if node.name().startswith("Transpose"):
        return after.transpose(*(signed(d) % len(shape) for d in (node._saved_dim0, node._saved_dim1)))
    return after.T


def _repeated(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    repeats, extra = node._saved_repeats, len(node._saved_repeats) - len(shape)
    after = after.any(list(range(extra))) if extra else after
    for axis, (times, size) in enumerate(zip(repeats[extra:], shape, strict=True)):
        if after.shape[axis] > 1:
            after = after.unflatten(axis, (times, size)).any(axis)
    return after


def _side_by_side(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    """One of those that were joined along an axis."""
    axis = _axis(node, len(shape))
    if after.shape[axis] == 1:
        return after
    sizes = shape_of(node)
    number = torch.arange(sizes[axis], dtype=node._input_metadata[0].dtype)  # to see where it lies: views of this
    place = node(number.reshape([-1 if k == axis else 1 for k in range(len(sizes))]).expand(sizes))[which]
    start = int(place.select(axis, 0).flatten()[0]) if place.numel() else 0
    return after.narrow(axis, start, shape[axis])


def _stacked(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    axis = _axis(node, len(shape) + 1)
    return after.select(axis, which if after.shape[axis] > 1 else 0)


def _padded(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """What was padded with a constant, or cut where the padding is negative."""
    pad = [signed(width) for width in node._saved_pad]
    if after is None:
        if min(pad) >= 0:
            return None
        after = _full(shape)
    for k in range(len(pad) // 2):
        axis, (left, right) = len(shape) - 1 - k, pad[2 * k : 2 * k + 2]
        if after.shape[axis] > 1 or min(left, right) < 0:
            wide = after.expand([shape_of(node)[axis] if j == axis else s for j, s in enumerate(after.shape)])
            after = torch.nn.functional.pad(wide, (0, 0) * k + (-left, -right))
    return after


def _mirrored(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    dims = [signed(axis) % len(shape) for axis in node._saved_dims]
    if node.name().startswith("Flip"):
        return after.flip(dims)
    shifts = [-signed(shift) for shift in node._saved_shifts]
    if not dims:  # it is rolled as one row
        return after.expand(shape).flatten().roll(shifts).reshape(tuple(shape))
    return after.roll(shifts, dims)


def _added_up(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Sums, means and norms along some axes."""
    if after.dim() == len(shape):
        return after
    if after.dim() == 0:
        return after.reshape([1] * len(shape))
    dims = getattr(node, "_saved_dim", None)
    dims = [dims] if isinstance(dims, int) else dims
    for axis in sorted(signed(d) % len(shape) for d in dims or ()):
        after = after.unsqueeze(axis)
    return after if after.dim() == len(shape) else None


def _running(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    """Cumulated sums."""
    axis = _axis(node, len(shape))
    return after.flip(axis).int().cumsum(axis).bool().flip(axis)


def _indexed(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Picked by indices or by masks."""
    indices = node._saved_indices
    axes: list[int] = []  # that are indexed; the others are left whole
    picked, k = 0, 0
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        width = index.dim() if masks else 1
        if index is not None:
            axes += range(k, k + width)
            picked = max(picked, 1 if masks else index.dim())
        k += width
    first = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0  # where those that it picks stand
    left = iter([1] * len(shape) if after is None else [*after.shape[:first], *after.shape[first + picked :]])
    size = [shape[k] if k in axes else next(left) for k in range(len(shape))]
    device = next(index.device for index in indices if index is not None)
    number = torch.arange(math.prod(size), device=device).reshape(size)
    number = number[tuple(slice(None) if index is None else index for index in indices)]
    sent = torch.ones((), dtype=torch.int32, device=device) if after is None else after.to(device, torch.int32)
    out = torch.zeros(math.prod(size), dtype=torch.int32, device=device)
    return out.index_add_(0, number.flatten(), sent.expand(number.shape).flatten()).reshape(size) > 0


def _selected(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    if which:
        return None
    axis, index = _axis(node, len(shape)), kept(node, "_saved_index").flatten()
    size = [1] * len(shape) if after is None else list(after.shape)
    size[axis] = len(index)
    after = torch.ones(size, device=index.device) if after is None else after.to(index.device).expand(size)
    size[axis] = shape[axis]
    return torch.zeros(size, device=index.device).index_add_(axis, index, after.float()) > 0


def _gathered(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Entries at places along an axis, each at its own: gathered, sorted, or the largest."""
    axis, index = _axis(node, len(shape)), getattr(node, "_saved_index", None)
    index = node._saved_indices if index is None else index
    if index.dim() < len(shape):  # the axis was dropped
        index = index.unsqueeze(axis)
        after = after if after is None else after.unsqueeze(axis)
    if not index.dim():
        return None
    alike = [k for k, (size, stride) in enumerate(zip(index.shape, index.stride(), strict=True)) if stride == 0 != size]
    alike = [k for k in alike if k != axis and index.shape[k] == shape[k] and (after is None or after.shape[k] == 1)]
    for k in alike:
        index = index.narrow(k, 0, 1)
    sent = torch.ones((), device=index.device) if after is None else after.to(index.device).float()
    size = [1 if k in alike else s for k, s in enumerate(shape)]
    return torch.zeros(size, device=index.device).scatter_add_(axis, index, sent.expand(index.shape).contiguous()) > 0


def _extreme(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The largest or the smallest along axes, or of all."""
    if getattr(node, "_saved_indices", None) is not None:
        return _gathered(node, which, after, shape)
    dims = getattr(node, "_saved_dim", None)
    if dims is None:
        return None
    result = kept(node, "_saved_result")
    if result.dim() < len(shape):
        for axis in sorted(signed(d) % len(shape) for d in dims or range(len(shape))):
            result = result.unsqueeze(axis)
            after = after if after is None else after.unsqueeze(axis)
    found = kept(node, "_saved_self") == result
    return found if after is None else found & after


def _gated(node: Any, which: int, after: Tensor, shape: Sequence[int]) -> Tensor:
    """One half along an axis times what is made of the other."""
    axis = _axis(node, len(shape))
    return after if after.shape[axis] == 1 else torch.cat([after, after], axis)


def _masked(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The entries that a mask picks, as one row."""
    mask = kept(node, "_saved_mask")
    if after is None:
        return mask[(None,) * (len(shape) - mask.dim())] if mask.dim() <= len(shape) else None
    full = mask.expand(tuple(shape))
    return torch.zeros_like(full).masked_scatter(full, after.expand(shape_of(node)))


#: Names of nodes that pick a part along an axis.
CUTS = kinds("Slice Select Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind Narrow")
#: By the name of a node, those of which all that they get is reached if all that they give is.
MOVES: dict[str, Callable[[Any, int, Tensor, Sequence[int]], Tensor | None]] = {
    **dict.fromkeys(kinds("View UnsafeView ReshapeAlias Reshape Unsqueeze Squeeze"), _laid_out),
    **dict.fromkeys(kinds("Transpose Permute T"), _turned),
    **dict.fromkeys(kinds("Flip Roll"), _mirrored),
    **dict.fromkeys(kinds("Sum Mean Nansum Logsumexp LinalgVectorNorm Norm Std Var Prod"), _added_up),
    "Repeat": _repeated,
    "Cat": _side_by_side,
    "Stack": _stacked,
    "Cumsum": _running,
    "Glu": _gated,
}
#: Others.
PICKS: dict[str, Rule] = {
    **dict.fromkeys(kinds("Gather Sort Topk Kthvalue Cummax Cummin Median Nanmedian Mode"), _gathered),
    **dict.fromkeys(kinds("Max Min Amax Amin"), _extreme),
    "ConstantPadNd": _padded,
    "Index": _indexed,
    "IndexSelect": _selected,
    "MaskedSelect": _masked,
}
