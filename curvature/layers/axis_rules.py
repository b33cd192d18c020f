"""Where the examples lie in the result of a function call, given where they lie in its arguments: one rule per group.

A rule is asked only about calls in which at least one argument holds examples on an axis and none mixes them; what it
cannot prove it answers with :data:`MIXED`. Axes are matched by labels, as in an einsum: an argument's example axis
must survive into the result, and all arguments must agree on where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.layers.axis_calls import (
    CONSTANT,
    COPYING,
    EXPOSING,
    MIXED,
    SHAPES,
    SHARING,
    UNREAD,
    UNWRITTEN,
    Axis,
    Call,
    Handle,
    Items,
    Labels,
    Mask,
    Result,
    Rule,
    State,
    axis_of,
    broadcast,
    contract,
    dims_of,
    dunders,
    functions,
    getters,
    handles,
    right,
    rule,
)

# ---- Elementwise -----------------------------------------------------------------------------------------------------


@rule(
    "abs+ absolute+ acos+ acosh+ add+ addcdiv+ addcmul+ angle arccos+ arccosh+ arcsin+ arcsinh+ arctan+ arctan2+ "
    "arctanh+ asin+ asinh+ atan+ atan2+ atanh+ bernoulli+ bitwise_and+ bitwise_not+ bitwise_or+ bitwise_xor+ "
    "bitwise_left_shift+ bitwise_right_shift+ ceil+ clamp+ clamp_max+ clamp_min+ clip+ complex conj_physical+ "
    "copysign+ cos+ cosh+ deg2rad+ digamma+ div+ divide+ eq+ erf+ erfc+ erfinv+ exp+ exp2+ expm1+ fix+ float_power+ "
    "floor+ floor_divide+ fmax fmin fmod+ frac+ ge+ greater+ greater_equal+ gt+ heaviside+ hypot+ i0+ isclose isfinite "
    "isinf isnan isneginf isposinf isreal le+ less+ less_equal+ ldexp+ lerp+ lgamma+ log+ log10+ log1p+ log2+ "
    "logaddexp logaddexp2 logical_and+ logical_not+ logical_or+ logical_xor+ logit+ lt+ maximum minimum mul+ multiply+ "
    "mvlgamma+ nan_to_num+ ne+ neg+ negative+ nextafter+ not_equal+ poisson polar polygamma+ positive pow+ rad2deg+ "
    "real reciprocal+ remainder+ round+ rsqrt+ rsub sgn+ sigmoid+ sign+ signbit sin+ sinc+ sinh+ special_entr sqrt+ "
    "square+ sub+ subtract+ tan+ tanh+ tril+ triu+ true_divide+ trunc+ where xlogy+ masked_fill+ "
    # Activations and noise.
    "relu+ relu6 leaky_relu+ elu+ selu+ celu+ gelu silu mish hardswish hardsigmoid hardtanh+ hardshrink softshrink "
    "tanhshrink softplus softsign logsigmoid threshold+ rrelu+ dropout+ alpha_dropout+ feature_dropout+ dropout1d "
    "dropout2d dropout3d feature_alpha_dropout+ native_dropout "
    # The same values again: copies, casts, flags, writing over all of a tensor.
    "clone copy_ fill_ zero_ normal_ uniform_ exponential_ random_ log_normal_ cauchy_ geometric_ float double half "
    "bfloat16 int long short bool char byte cdouble cfloat",
    *dunders(
        "add radd iadd sub rsub isub mul rmul imul div rdiv idiv truediv rtruediv itruediv floordiv rfloordiv mod"
    ),
    *dunders("ifloordiv rmod imod pow rpow ipow and rand iand or ror ior xor rxor ixor invert neg pos abs eq ne lt le"),
    *dunders("gt ge lshift rlshift ilshift rshift rrshift irshift"),
    *functions("entr erf erfc erfinv exp2 expit expm1 gammaln i0 log1p logit ndtr xlog1py xlogy", [torch.special]),
)
def _elementwise(call: Call) -> Result:
    """Every entry from the entries at its place, with broadcasting."""
    if call.func is torch.where and len(call.args) + len(call.kwargs) == 1:
        return MIXED  # the places of the entries that hold
    return broadcast(call, call.read, call.outputs[0].shape)


@rule(
    "contiguous detach+ alias requires_grad_ to cpu cuda type type_as expand broadcast_to conj real imag resolve_conj "
    "resolve_neg pin_memory",
    *getters("data real imag"),
    sharing=True,
)
def _same(call: Call) -> Result:
    """The first argument, as it is or broadcast."""
    return broadcast(call, call.args[:1], call.outputs[0].shape)


SHARING.update(
    functions("float double half bfloat16 int long short bool char byte dropout dropout1d dropout2d dropout3d")
)
SHARING.update(functions("alpha_dropout feature_alpha_dropout feature_dropout relu6 threshold hardtanh leaky_relu elu"))
rule("expand_as", sharing=True)(_same)


@rule("broadcast_tensors", sharing=True)
def _broadcast_tensors(call: Call) -> Result:
    return [broadcast(call, [h], o.shape) for h, o in zip(call.read, call.outputs, strict=True)]


@rule("prelu")
def _prelu(call: Call) -> Result:
    x, weight = handles(call.args)
    return call.state(x) if call.constant(weight) else MIXED


# ---- Axes moved, cut and merged --------------------------------------------------------------------------------------


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


# ---- Along some axes -------------------------------------------------------------------------------------------------

_REDUCTIONS = (
    "sum nansum mean nanmean prod std var std_mean var_mean amax amin aminmax logsumexp argmax argmin all any "
    "count_nonzero median nanmedian mode max min"
)


def reduced(call: Call, dims: tuple[int, ...] | None) -> Result:
    """The axes ``dims`` are summed up, or kept with one entry."""
    x = call.args[0]
    if not dims or not call.constant(*call.args[1:]):
        return MIXED
    if len(call.outputs[0].shape) == len(x.shape):  # keepdim
        state = axis_of(call, x)
        return MIXED if state is None or state.axis in dims else state
    return without(call, x, dims)


@rule(_REDUCTIONS)
def _reduction(call: Call) -> Result:
    value = call.get(1, "dim", call.kwargs.get("axis"))
    if type(value) is Handle or "other" in call.kwargs:
        return _elementwise(call)  # max(x, y)
    return reduced(call, dims_of(value, len(call.args[0].shape)))


@rule("norm", *functions("norm vector_norm", [torch.linalg]))
def _norm(call: Call) -> Result:
    return reduced(call, dims_of(call.get(2, "dim"), len(call.args[0].shape)))


def along(position: int, default: Any = None, names: Sequence[str] = ("dim", "dims")) -> Rule:
    """Rule for functions that mix entries along the axes of one argument only, and keep the number of axes."""

    def apply(call: Call) -> Result:
        x = call.args[0]
        value = call.get(position, names[0], next((call.kwargs[n] for n in names if n in call.kwargs), default))
        if position == 1 and call.func is Tensor.flip:
            value = call.args[1] if isinstance(call.get(1, "dims"), tuple) else call.args[1:]
        dims, state = dims_of(value, len(x.shape)), axis_of(call, x)
        return MIXED if not dims or state is None or state.axis in dims or not call.constant(call.besides(x)) else state

    return apply


rule("softmax log_softmax softmin cumsum+ cumprod+ cummax cummin logcumsumexp flip")(along(1))
rule("sort argsort glu")(along(1, -1))
rule("topk")(along(2, -1))
rule("gumbel_softmax")(along(4, -1))
rule("kthvalue")(along(2, -1))
rule("roll")(along(2))
rule("diff")(along(2, -1))
rule("normalize")(along(2, 1))
rule("unfold", places=[Tensor], sharing=True)(along(1, names=("dimension",)))
rule("fft ifft rfft irfft hfft ihfft", places=[torch.fft])(along(2, -1))
rule("fft2 ifft2 rfft2 irfft2", places=[torch.fft])(along(2, (-2, -1)))
rule("fftn ifftn rfftn irfftn", places=[torch.fft])(along(2))
rule("fftshift ifftshift", places=[torch.fft])(along(1))
rule("softmax log_softmax", places=[torch.special])(along(1))


@rule("cosine_similarity pairwise_distance")
def _similarity(call: Call) -> Result:
    """Elementwise, then one axis is summed up."""
    x, y = call.args[:2]
    width = max(len(x.shape), len(y.shape))
    by_name = call.func in functions("cosine_similarity")
    dim = dims_of(call.get(2, "dim", 1) if by_name else -1, width)
    if dim is None or len(call.outputs[0].shape) != width - 1:
        return MIXED
    return contract(call, [d for d in range(width) if d != dim[0]], *((h, right(h, width)) for h in (x, y)))


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


# ---- Products --------------------------------------------------------------------------------------------------------


@rule("linear")
def _linear(call: Call) -> Result:
    x, weight, bias = (call.get(i, n) for i, n in enumerate(("input", "weight", "bias")))
    lead = range(len(x.shape) - 1)
    w: Labels = ("o", "i") if len(weight.shape) == 2 else ("i",)
    return contract(call, [*lead, *w[:-1]], (x, [*lead, "i"]), (weight, w), *_optional(bias, w[:-1]))


def _optional(handle: Any, labels: Labels) -> list[tuple[Any, Labels]]:
    return [(handle, labels)] if type(handle) is Handle and len(handle.shape) == len(labels) else []


def product(call: Call, x: Handle, y: Handle, *added: Handle) -> State:
    """``added + x @ y``."""
    m, n = len(x.shape), len(y.shape)
    width = max(m, n, 2) - 2
    rows: Labels = ["i"] if m > 1 else []
    columns: Labels = ["j"] if n > 1 else []
    out = [*range(width), *rows, *columns]
    left = (x, [*range(width)[width - max(m - 2, 0) :], *rows, "k"])
    other = (y, [*range(width)[width - max(n - 2, 0) :], "k", *columns])
    return contract(call, out, left, other, *((a, out[len(out) - len(a.shape) :]) for a in added))


@rule("matmul mm bmm mv dot", Tensor.__matmul__, Tensor.__rmatmul__, *functions("matmul", [torch.linalg]))
def _matmul(call: Call) -> Result:
    x, y = handles(call.args)
    return product(call, y, x) if call.func is Tensor.__rmatmul__ else product(call, x, y)


@rule("addmm+ addbmm+ baddbmm+ addmv+")
def _addmm(call: Call) -> Result:
    added, x, y = handles(call.args)
    if call.func in functions("addbmm+"):
        return (
            MIXED
            if len(call.outputs[0].shape) != 2
            else contract(
                call,
                ["i", "j"],
                (added, ["i", "j"][2 - len(added.shape) :]),
                (x, ["b", "i", "k"]),
                (y, ["b", "k", "j"]),
            )
        )
    return product(call, x, y, added)


@rule("outer ger")
def _outer(call: Call) -> Result:
    x, y = handles(call.args)
    return contract(call, "ij", (x, "i"), (y, "j"))


@rule("bilinear")
def _bilinear(call: Call) -> Result:
    x, y, weight, bias = (call.get(i, n) for i, n in enumerate(("input1", "input2", "weight", "bias")))
    lead = range(len(x.shape) - 1)
    return contract(call, [*lead, "o"], (x, [*lead, "i"]), (y, [*lead, "j"]), (weight, "oij"), *_optional(bias, "o"))


@rule("cdist")
def _cdist(call: Call) -> Result:
    x, y = (call.get(i, n) for i, n in enumerate(("x1", "x2")))
    width = len(call.outputs[0].shape) - 2
    lead = range(width)
    a, b = ([*lead[width - len(h.shape) + 2 :], label, "k"] for h, label in ((x, "i"), (y, "j")))
    return contract(call, [*lead, "i", "j"], (x, a), (y, b))


@rule("einsum", sharing=True)
def _einsum(call: Call) -> Result:
    equation = call.args[0]
    operands = [*call.args[1:]]
    if len(operands) == 1 and isinstance(operands[0], tuple):
        operands = [*operands[0]]
    if not isinstance(equation, str) or not all(type(h) is Handle for h in operands):
        return MIXED
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return MIXED
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    widths = [len(h.shape) - len(t.replace("...", "")) for t, h in zip(terms, operands, strict=True) if "..." in t]
    dots = max(widths, default=0)

    def labels(term: str, width: int) -> Labels:
        before, found, after = term.partition("...")
        return [*before, *(range(dots - width, dots) if found else ()), *after]

    pairs = [(h, labels(t, len(h.shape) - len(t.replace("...", "")))) for t, h in zip(terms, operands, strict=True)]
    return contract(call, labels(out, dots), *pairs)


@rule("tensordot")
def _tensordot(call: Call) -> Result:
    x, y, dims = (call.get(i, n, 2) for i, n in enumerate(("a", "b", "dims")))
    m, n = len(x.shape), len(y.shape)
    if type(dims) is int:
        pair = (tuple(range(m - dims, m)), tuple(range(dims)))
    elif isinstance(dims, tuple) and len(dims) == 2:
        a, b = dims_of(dims[0], m), dims_of(dims[1], n)
        if a is None or b is None:
            return MIXED
        pair = (a, b)
    else:
        return MIXED
    left: list[Any] = [("x", d) for d in range(m)]
    right_: list[Any] = [("y", d) for d in range(n)]
    for k, (i, j) in enumerate(zip(*pair, strict=True)):
        left[i] = right_[j] = ("sum", k)
    out = [label for label in (*left, *right_) if label[0] != "sum"]
    return contract(call, out, (x, left), (y, right_))


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Result:
    q, k, v, mask = (call.get(i, n) for i, n in enumerate(("query", "key", "value", "attn_mask")))
    width = len(q.shape) - 2
    pairs: list[tuple[Any, Labels]] = []
    for h, last in ((q, ("l", "e")), (k, ("s", "e")), (v, ("s", "v")), (mask, ("l", "s"))):
        if type(h) is Handle:
            labels = [*range(width), *last]
            if len(h.shape) > width + 2:
                return MIXED
            pairs.append((h, labels[width + 2 - len(h.shape) :]))
    return contract(call, [*range(width), "l", "v"], *pairs)


@rule("", F.multi_head_attention_forward)
def _multi_head_attention(call: Call) -> Result:
    """Sequences before batch, the weights that come along batch first."""
    bound = call.bound()
    query, padding, mask = bound["query"], bound["key_padding_mask"], bound["attn_mask"]
    sequences = [bound[name] for name in ("query", "key", "value")]
    others = [v for k, v in bound.items() if k not in ("query", "key", "value", "key_padding_mask", "attn_mask")]
    if len(query.shape) != 3 or not call.constant(tuple(others)):
        return MIXED
    fits = all(call.state(h) in (CONSTANT, Axis(1)) for h in sequences)
    fits &= call.state(padding) in (CONSTANT, Axis(0))
    fits &= call.state(mask) in (CONSTANT, Axis(0, 1, bound["num_heads"]))
    return [Axis(1), Axis(0)][: len(call.outputs)] if fits else MIXED


# ---- Layers ----------------------------------------------------------------------------------------------------------


def leading(trailing: int) -> Rule:
    """Rule for functions of one tensor that mix the last ``trailing`` axes and keep those before."""

    def apply(call: Call) -> Result:
        x = call.args[0]
        return kept_before(call, x, len(x.shape) - trailing) if type(x) is Handle else MIXED

    return apply


def kept_before(call: Call, x: Handle, width: int) -> State:
    """The state of ``x`` if examples lie on one of the first ``width`` axes and everything else is constant."""
    state = axis_of(call, x)
    return MIXED if state is None or state.axis >= width or not call.constant(call.besides(x)) else state


for _d in (1, 2, 3):
    rule(f"max_pool{_d}d avg_pool{_d}d adaptive_avg_pool{_d}d adaptive_max_pool{_d}d lp_pool{_d}d")(leading(_d))
    rule(f"max_pool{_d}d_with_indices adaptive_max_pool{_d}d_with_indices")(leading(_d))
    rule("lp_pool2d" if _d == 2 else "")(leading(_d))
    rule(f"fractional_max_pool{_d}d")(leading(_d))
rule("interpolate upsample")(lambda call: kept_before(call, call.args[0], 2))
rule("pixel_shuffle pixel_unshuffle", sharing=True)(leading(3))
rule("channel_shuffle", sharing=True)(lambda call: kept_before(call, call.args[0], 1))
rule("group_norm instance_norm local_response_norm")(lambda call: kept_before(call, call.args[0], 1))
rule("inv inverse pinv pinverse cholesky matrix_exp svd svdvals qr eigh eigvalsh eig eigvals det slogdet", places=[
    torch.linalg
])(leading(2))  # fmt: skip
rule("inverse pinverse cholesky matrix_exp det slogdet logdet cholesky_inverse")(leading(2))


@rule("unfold fold", places=[F])
def _unfold(call: Call) -> Result:
    x = call.args[0]
    batched = len(x.shape) == (4 if call.func is F.unfold else 3)
    return kept_before(call, x, 1) if batched else MIXED


@rule("pad")
def _pad(call: Call) -> Result:
    x, amounts = call.get(0, "input"), call.get(1, "pad")
    return kept_before(call, x, len(x.shape) - len(amounts) // 2) if isinstance(amounts, tuple) else MIXED


@rule("grid_sample")
def _grid_sample(call: Call) -> Result:
    fits = all(call.state(h) in (CONSTANT, Axis(0)) for h in call.read)
    return Axis(0) if fits else MIXED


@rule("affine_grid")
def _affine_grid(call: Call) -> Result:
    return kept_before(call, call.args[0], 1)


def convolution(spatial: int, groups_at: int) -> Rule:
    """Rule for (transposed) convolutions."""

    def apply(call: Call) -> Result:
        x, weight = call.get(0, "input"), call.get(1, "weight")
        if len(x.shape) != spatial + 2 or not call.constant(call.besides(x, weight)):
            return MIXED
        state, kernel, n = axis_of(call, x), call.state(weight), call.batch
        if state is not None and state.axis == 0 and kernel is CONSTANT:
            return state
        # Examples in the channels, each in groups of its own: kernels per example.
        groups = call.get(groups_at, "groups", 1)
        per_example = isinstance(kernel, Axis) and kernel.axis == 0 and kernel.outer == 1
        if groups_at != 6 or type(groups) is not int or groups % n or not (kernel is CONSTANT or per_example):
            return MIXED
        if state is not None and (state.axis, state.outer) != (1, 1):
            return MIXED
        return Axis(1, 1, call.outputs[0].shape[1] // n)

    return apply


for _d in (1, 2, 3):
    rule(f"conv{_d}d")(convolution(_d, 6))
    rule(f"conv_transpose{_d}d")(convolution(_d, 7))


@rule("layer_norm rms_norm")
def _layer_norm(call: Call) -> Result:
    x, shape = call.get(0, "input"), call.get(1, "normalized_shape")
    return kept_before(call, x, len(x.shape) - len(shape)) if isinstance(shape, tuple) else MIXED


def in_training(call: Call) -> bool:
    """Whether a call of ``batch_norm`` takes the statistics of the batch."""
    return bool(call.get(5, "training", False))


@rule("batch_norm", places=[F])
def _batch_norm(call: Call) -> Result:
    """Scale and shift by statistics that are taken as fixed; of a batch they are reported apart."""
    x = call.args[0]
    return call.state(x) if call.constant(call.besides(x)) else MIXED


def _running(call: Call) -> tuple[Any, ...]:
    return call.get(1, "running_mean"), call.get(2, "running_var")


UNREAD[F.batch_norm] = lambda call: _running(call) if in_training(call) else ()
UNREAD[F.instance_norm] = lambda call: _running(call) if call.get(5, "use_input_stats", True) else ()


@rule("embedding")
def _embedding(call: Call) -> Result:
    ids, weight = call.get(0, "input"), call.get(1, "weight")
    if call.func is torch.embedding:
        ids, weight = weight, ids
    return call.state(ids) if call.constant(weight) else MIXED


@rule("embedding_bag", places=[F])
def _embedding_bag(call: Call) -> Result:
    bound = call.bound()
    ids, weights = bound["input"], bound["per_sample_weights"]
    if len(ids.shape) != 2 or not call.constant(bound["weight"]):
        return MIXED
    fits = all(call.state(h) in (CONSTANT, Axis(0)) for h in (ids, weights))
    return Axis(0) if fits else MIXED


@rule("lstm gru rnn_tanh rnn_relu")
def _recurrent(call: Call) -> Result:
    """Only sequences of one length; packed ones come with a tensor of batch sizes in the second place."""
    if len(call.args) != 9 or type(call.args[3]) is not bool:
        return MIXED
    x, hidden, weights, batch_first = call.args[0], call.args[1], call.args[2], call.args[8]
    axis = Axis(0 if batch_first else 1)
    if len(x.shape) != 3 or not call.constant(weights):
        return MIXED
    fits = call.state(x) in (CONSTANT, axis) and all(call.state(h) in (CONSTANT, Axis(1)) for h in handles((hidden,)))
    return [axis, Axis(1), Axis(1)][: len(call.outputs)] if fits else MIXED


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def _recurrent_cell(call: Call) -> Result:
    fits = all(call.state(h) in (CONSTANT, Axis(0)) for h in handles(call.args[:2]))
    return Axis(0) if fits and call.constant(call.args[2:]) and len(call.args[0].shape) == 2 else MIXED


# ---- Losses ----------------------------------------------------------------------------------------------------------


@rule(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "poisson_nll_loss gaussian_nll_loss soft_margin_loss",
    places=[F],
)
def _elementwise_loss(call: Call) -> Result:
    bound = call.bound()
    unreduced = bound["reduction"] == "none" and bound.get("reduce") is None and bound.get("size_average") is None
    return _elementwise(call) if unreduced else MIXED


@rule("cross_entropy nll_loss", places=[F])
def _class_loss(call: Call) -> Result:
    bound = call.bound()
    x, target, weight = bound["input"], bound["target"], bound["weight"]
    unreduced = bound["reduction"] == "none" and bound["reduce"] is None and bound["size_average"] is None
    if not unreduced or len(x.shape) < 2 or not call.constant(weight):
        return MIXED
    labels = [0, "class", *range(2, len(x.shape))]
    out = [0, *range(2, len(x.shape))]
    return contract(call, out, (x, labels), (target, labels if len(target.shape) == len(x.shape) else out))


# ---- Indices ---------------------------------------------------------------------------------------------------------


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


# ---- Functions that stand apart --------------------------------------------------------------------------------------

SHAPES.update(
    functions(
        "zeros_like ones_like full_like rand_like randn_like randint_like empty_like new_zeros new_ones new_full "
        "new_empty new_empty_strided"
    )
)
COPYING.update(
    functions(
        "reshape view flatten unflatten ravel squeeze unsqueeze view_as reshape_as expand expand_as broadcast_to "
        "permute transpose movedim t contiguous detach clone long int to"
    ),
    [Tensor.__getitem__],
)
UNWRITTEN.update(functions("empty empty_like empty_strided new_empty new_empty_strided empty_permuted"))
UNREAD.update(  # writing over all of a tensor
    dict.fromkeys(functions("copy_ fill_ zero_ normal_ uniform_ exponential_ random_"), lambda call: call.args[:1])
)
EXPOSING.update(
    functions("data_ptr numpy storage untyped_storage __dlpack__ __array__", (Tensor,)),
    [Tensor.__cuda_array_interface__.__get__],
)
