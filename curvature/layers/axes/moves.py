"""Rules for functions that move, cut, merge, repeat and join axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F

from curvature.layers.axes.calls import (
    CONSTANT,
    MIXED,
    Axis,
    Call,
    Handle,
    Result,
    State,
    axis_of,
    contract,
    dims_of,
    getters,
    rule,
)


@rule(
    "reshape view flatten unflatten ravel squeeze+ unsqueeze+ view_as reshape_as atleast_1d atleast_2d atleast_3d",
    sharing=True,
)
def _reshape(call: Call) -> Result:
    """The entries keep their order: the example is ``index // post % N`` before and after."""
    x, out = call.args[0], call.outputs[0]
    if type(x) is not Handle or len(call.outputs) > 1:
        return MIXED
    state = axis_of(call, x)
    if state is None:
        return CONSTANT
    if math.prod(x.shape) != math.prod(out.shape):
        return MIXED  # another dtype
    return placed(state.inner * math.prod(x.shape[state.axis + 1 :]), out.shape, call.batch, state.axis)


def placed(post: int, shape: Sequence[int], batch: int, hint: int) -> State:
    """The state of a tensor in which the example is ``index // post % batch`` of the flat index."""
    for axis in sorted(range(len(shape)), key=lambda axis: (axis != hint, axis)):
        suffix = math.prod(shape[axis + 1 :])
        if post % suffix == 0 and shape[axis] % (post // suffix * batch) == 0:
            inner = post // suffix
            return Axis(axis, shape[axis] // (batch * inner), inner)
    return MIXED


@rule("permute", sharing=True)
def _permute(call: Call) -> Result:
    x = call.args[0]
    order = call.kwargs.get("dims", call.args[1:])
    order = order[0] if len(order) == 1 and isinstance(order[0], tuple) else order
    order = dims_of(tuple(order), len(x.shape))
    return MIXED if order is None else contract(call, order, (x, range(len(x.shape))))


@rule("transpose+ swapaxes+ swapdims+", sharing=True)
def _transpose(call: Call) -> Result:
    x, width = call.args[0], len(call.args[0].shape)
    a = call.get(1, "dim0", call.kwargs.get("axis0"))
    b = call.get(2, "dim1", call.kwargs.get("axis1"))
    if type(a) is not int or type(b) is not int:
        return MIXED
    order = list(range(width))
    order[a], order[b] = order[b], order[a]
    return contract(call, order, (x, range(width)))


@rule("t+ adjoint", *getters("mT mH"), sharing=True)
def _last_two_swapped(call: Call) -> Result:
    x, width = call.args[0], len(call.args[0].shape)
    order = list(range(width))
    order[-2:] = order[-2:][::-1]
    return contract(call, order, (x, range(width)))


@rule("", *getters("T H"), sharing=True)
def _reversed_axes(call: Call) -> Result:
    labels = range(len(call.args[0].shape))
    return contract(call, labels[::-1], (call.args[0], labels))


@rule("movedim moveaxis", sharing=True)
def _movedim(call: Call) -> Result:
    x, width = call.args[0], len(call.args[0].shape)
    source, target = dims_of(call.get(1, "source"), width), dims_of(call.get(2, "destination"), width)
    if source is None or target is None:
        return MIXED
    order: list[int | None] = [None] * width
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter([d for d in range(width) if d not in source])
    return contract(call, [next(rest) if d is None else d for d in order], (x, range(width)))


@rule("repeat tile")
def _repeat(call: Call) -> Result:
    """Copies of all of it along an axis."""
    x, out = call.args[0], call.outputs[0]
    state = axis_of(call, x)
    if state is None:
        return CONSTANT
    axis = state.axis + len(out.shape) - len(x.shape)
    return Axis(axis, state.outer * (out.shape[axis] // x.shape[state.axis]), state.inner)


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Result:
    """Copies of each entry beside it."""
    x, times, dim = call.args[0], call.get(1, "repeats"), call.get(2, "dim")
    state = axis_of(call, x)
    if state is None:
        return MIXED
    if dim is None:
        return MIXED if len(x.shape) != 1 or type(times) is not int else Axis(0, state.outer, state.inner * times)
    (dim,) = dims_of(dim, len(x.shape)) or (-1,)
    if dim != state.axis:
        return state if call.constant(times) and dim >= 0 else MIXED
    return Axis(dim, state.outer, state.inner * times) if type(times) is int else MIXED


def cut(state: Axis, size: int, start: int, stop: int, batch: int) -> State:
    """The entries from ``start`` to ``stop`` of an example axis with ``size`` entries."""
    unit = batch * state.inner
    if (start, stop) == (0, size):
        return state
    return MIXED if start % unit or stop % unit else Axis(state.axis, (stop - start) // unit, state.inner)


@rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes", sharing=True)
def _split(call: Call) -> Result:
    x = call.args[0]
    state = axis_of(call, x)
    (dim,) = dims_of(call.get(2, "dim", 0), len(x.shape)) or (-1,)
    if state is None or dim < 0 or not call.constant(*call.args[1:]):
        return MIXED
    if dim != state.axis:
        return state
    if sum(out.shape[dim] for out in call.outputs) != x.shape[dim]:
        return MIXED
    states, start = [], 0
    for out in call.outputs:
        states.append(cut(state, x.shape[dim], start, start + out.shape[dim], call.batch))
        start += out.shape[dim]
    return states


@rule("unbind select", sharing=True)
def _removed(call: Call) -> Result:
    x = call.args[0]
    dim = dims_of(call.get(1, "dim", 0), len(x.shape))
    return MIXED if dim is None else without(call, x, dim)


def without(call: Call, x: Handle, dims: Sequence[int]) -> State:
    """State after the axes ``dims`` are gone."""
    labels = range(len(x.shape))
    return contract(call, [d for d in labels if d not in dims], (x, labels))


@rule("narrow", sharing=True)
def _narrow(call: Call) -> Result:
    x, dim, start, length = (call.get(i, n) for i, n in enumerate(("input", "dim", "start", "length")))
    state = axis_of(call, x)
    (dim,) = dims_of(dim, len(x.shape)) or (-1,)
    if state is None or dim < 0 or type(start) is not int or type(length) is not int:
        return MIXED
    start %= max(x.shape[dim], 1)
    return state if dim != state.axis else cut(state, x.shape[dim], start, start + length, call.batch)


@rule("diagonal", sharing=True)
def _diagonal(call: Call) -> Result:
    x, width = call.args[0], len(call.args[0].shape)
    dims = dims_of((call.get(2, "dim1", 0), call.get(3, "dim2", 1)), width)
    if dims is None:
        return MIXED
    return contract(call, [*(d for d in range(width) if d not in dims), "diagonal"], (x, range(width)))


@rule("diag_embed one_hot view_as_real", sharing=True)
def _axes_added_last(call: Call) -> Result:
    return call.state(call.args[0]) if len(call.args) == 1 or call.func is F.one_hot else MIXED


@rule("view_as_complex", sharing=True)
def _last_axis_removed(call: Call) -> Result:
    return without(call, call.args[0], (len(call.args[0].shape) - 1,))


@rule("cat concat concatenate")
def _cat(call: Call) -> Result:
    parts, dim = [*call.get(0, "tensors")], call.get(1, "dim", call.kwargs.get("axis", 0))
    parts, shape = [p for p in parts if p.shape != (0,)], call.outputs[0].shape
    (dim,) = dims_of(dim, len(shape)) or (-1,)
    states = [s for p in parts if isinstance(s := call.state(p), Axis)]
    unit = states[0].inner * call.batch
    if dim < 0 or any((s.axis, s.inner) != (states[0].axis, states[0].inner) for s in states):
        return MIXED
    if dim != states[0].axis:
        return states[0] if len(set(states)) == 1 else MIXED
    return MIXED if any(p.shape[dim] % unit for p in parts) else Axis(dim, shape[dim] // unit, states[0].inner)


@rule("stack")
def _stack(call: Call) -> Result:
    parts, shape = call.get(0, "tensors"), call.outputs[0].shape
    dim = dims_of(call.get(1, "dim", 0), len(shape))
    if dim is None:
        return MIXED
    labels = [d for d in range(len(shape)) if d != dim[0]]
    return contract(call, range(len(shape)), *((p, labels) for p in parts))
