"""Rules for entries that are picked and put by indices and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.layers.axes.calls import (
    CONSTANT,
    MIXED,
    Axis,
    Call,
    Handle,
    Items,
    Mask,
    Result,
    State,
    axis_of,
    contract,
    dims_of,
    rule,
)
from curvature.layers.axes.moves import cut


@rule("index_select")
def _index_select(call: Call) -> Result:
    x, dim, index = (call.get(i, n) for i, n in enumerate(("input", "dim", "index")))
    width = len(x.shape)
    dims = dims_of(dim, width)
    if dims is None:
        return MIXED
    labels = [("along", d) if d == dims[0] else d for d in range(width)]
    return contract(call, range(width), (x, labels), (index, dims[: len(index.shape)]))


@rule("gather take_along_dim")
def _gather(call: Call) -> Result:
    x = call.args[0]
    names = {a if isinstance(a, int) else "index": a for a in call.args[1:]} | dict(call.kwargs)
    index = next(h for h in (*call.args[1:], *call.kwargs.values()) if type(h) is Handle)
    dim = next((v for k, v in names.items() if k != "index" and type(v) is int), None)
    dims = dims_of(dim, len(x.shape))
    if dims is None or len(x.shape) != len(index.shape):
        return MIXED
    labels = [("along", d) if d == dims[0] else d for d in range(len(x.shape))]
    return contract(call, range(len(x.shape)), (x, labels), (index, range(len(x.shape))))


@rule("scatter+ scatter_add+ scatter_reduce+ index_add+ index_copy+ index_fill+")
def _scatter(call: Call) -> Result:
    """Entries of other tensors are put, or added, at places along one axis."""
    x, width = call.args[0], len(call.args[0].shape)
    dims = dims_of(call.get(1, "dim"), width)
    if dims is None:
        return MIXED
    labels = [("along", d) if d == dims[0] else d for d in range(width)]
    rest = call.besides(x)
    if any(len(h.shape) not in (width, 0) and not call.constant(h) for h in rest):
        return MIXED
    return contract(call, range(width), (x, range(width)), *((h, labels) for h in rest if len(h.shape) == width))


@rule("", Tensor.__getitem__, sharing=True)
def _getitem(call: Call) -> Result:
    return indexed(call, call.args[0], call.state(call.args[0]), call.args[1])


def indexed(call: Call, x: Handle, state: State, index: Any) -> State:
    """State of ``x[index]`` if ``x`` is in ``state``."""
    parts = list(index) if type(index) is tuple else [index]
    used = sum(len(p.handle.shape) if type(p) is Mask else 0 if p is None else 1 for p in parts if p is not Ellipsis)
    rest: list[Any] = [slice(None)] * (len(x.shape) - used)
    if not _regular(index):
        return MIXED
    at = next((i for i, p in enumerate(parts) if p is Ellipsis), len(parts))
    parts[at : at + 1] = rest
    out: list[Any] = []  # axes of x in the result, "new" and "index" for others
    advanced: list[tuple[int, Any]] = []
    d = 0
    for part in parts:
        kind = type(part)
        if part is None:
            out.append("new")
            continue
        if kind is Mask or kind is Items or (kind is Handle and part.shape):
            width = len(part.handle.shape) if kind is Mask else 1
            advanced += [(d + i, part) for i in range(width)]
            out.append("index")
            d += width
            continue
        on_axis = isinstance(state, Axis) and state.axis == d
        if kind is slice:
            if on_axis and isinstance(state, Axis):
                start, stop, step = part.indices(x.shape[d])
                cut_to = cut(state, x.shape[d], start, max(start, stop), call.batch) if step == 1 else MIXED
                if not isinstance(cut_to, Axis):
                    return MIXED
                state = cut_to
            out.append(d)
        elif kind is not int and not (kind is Handle and call.constant(part)):
            return MIXED
        d += 1
    if not advanced:
        return CONSTANT if not isinstance(state, Axis) else _moved(state, out)
    return _advanced(call, state, out, advanced)


def _moved(state: Axis, out: list[Any]) -> State:
    return Axis(out.index(state.axis), state.outer, state.inner) if state.axis in out else MIXED


def _advanced(call: Call, state: State, out: list[Any], advanced: list[tuple[int, Any]]) -> State:
    """Some axes are indexed by tensors; these give the axes of their common shape."""
    indices = [part for _, part in advanced if type(part) is Handle]
    width = max([len(h.shape) for h in indices] + [1])
    places = [i for i, label in enumerate(out) if label == "index"]
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    before = [label for label in out[:first] if label != "index"]
    after = [label for label in out[first:] if label != "index"]
    result = [*before, *(("index", i) for i in range(width)), *after]
    on_axis = [part for d, part in advanced if isinstance(state, Axis) and d == state.axis]
    masks = any(type(part) is not Handle for _, part in advanced)
    if isinstance(state, Axis) and not on_axis:
        return _moved(state, result) if call.constant(tuple(part for _, part in advanced)) else MIXED
    if masks and not call.constant(tuple(part for _, part in advanced)):
        return MIXED
    own: set[State] = set()
    for part in indices:
        held = axis_of(call, part)
        if held is not None:
            own.add(Axis(held.axis + width - len(part.shape), held.outer, held.inner))
    if on_axis:  # x[arange(N), ...] takes every example once, in order
        counting = call.iota(on_axis[0]) if type(on_axis[0]) is Handle else None
        if masks or counting is None or state != Axis(state.axis if isinstance(state, Axis) else 0):
            return MIXED
        if on_axis[0].shape[counting.axis] != call.batch:
            return MIXED
        own.add(Axis(counting.axis + width - len(on_axis[0].shape)))
    if len(own) != 1:
        return MIXED if own else CONSTANT
    (found,) = own
    assert isinstance(found, Axis)
    return Axis(result.index(("index", found.axis)), found.outer, found.inner)


@rule("", Tensor.__setitem__)
def _setitem(call: Call) -> Result:
    x, index, value = call.args
    state, held = axis_of(call, x), call.state(value)
    if isinstance(index, Mask) or (type(index) is tuple and any(type(p) is Mask for p in index)):
        masks = tuple(p.handle for p in (index if type(index) is tuple else (index,)) if type(p) is Mask)
        if held is CONSTANT and state is not None and call.constant(masks):
            return state
        single = type(index) is Mask and held is CONSTANT and (type(value) is not Handle or not value.shape)
        same_axes = {s for h in (x, *masks) if (s := call.state(h)) is not CONSTANT}
        return same_axes.pop() if single and len(same_axes) == 1 else MIXED
    if not call.constant(index if type(index) is tuple else (index,)):
        return MIXED
    if held is CONSTANT and state is not None and _regular(index):
        return state
    # Wherever the value's axis can have come from.
    candidates = [state] if state is not None else []
    if state is None and isinstance(held, Axis):
        candidates = [Axis(d, held.outer, held.inner) for d in range(len(x.shape))]
        candidates = [c for c in candidates if x.shape[c.axis] == c.outer * call.batch * c.inner]
    for candidate in candidates:
        region = indexed(call, x, candidate, index)
        if isinstance(region, Axis) and (held is CONSTANT or _same_from_right(x, index, region, value, held)):
            return candidate
    return MIXED


def _regular(index: Any) -> bool:
    """Whether an index has nothing but integers, slices, tensors, lists of integers, new axes and an ellipsis."""
    kinds = (int, slice, Handle, Mask, type(None), type(Ellipsis))
    parts = index if type(index) is tuple else (index,)
    return all(type(p) in kinds or (type(p) is Items and all(type(i) is int for i in p)) for p in parts)


def _same_from_right(x: Handle, index: Any, region: Axis, value: Handle, held: State) -> bool:
    """Whether a value that is broadcast into ``x[index]`` has its examples where the region has them."""
    shape = torch.empty(x.shape, device="meta")[_plain(index)].shape
    return (
        isinstance(held, Axis)
        and len(value.shape) - held.axis == len(shape) - region.axis
        and (held.outer, held.inner) == (region.outer, region.inner)
        and value.shape[held.axis] == shape[region.axis]
    )


def _plain(index: Any) -> Any:
    """An index of the same shape, for a tensor without memory."""
    if type(index) is tuple:
        return tuple(_plain(part) for part in index)
    if type(index) is Handle:
        return torch.zeros(index.shape, dtype=torch.long, device="meta") if index.shape else 0
    return list(index) if type(index) is Items else index
