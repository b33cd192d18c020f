"""Rules for products of matrices, contractions and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.layers.axes.calls import (
    CONSTANT,
    MIXED,
    Axis,
    Call,
    Handle,
    Labels,
    Result,
    State,
    contract,
    dims_of,
    functions,
    handles,
    rule,
)


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
