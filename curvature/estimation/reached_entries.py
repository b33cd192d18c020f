"""Entries of the tensors in a graph from which a way leads to an output: by indices, cuts and masks, not by values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.reached_by_attention import SOFTMAX, renormalised_scores, unhidden_scores
from curvature.estimation.reached_by_moves import CUTS, MOVES, PICKS, along, cut, spread
from curvature.estimation.reached_by_products import PRODUCTS, one_factor
from curvature.model.graph_nodes import Ends, asking, kind_of, kinds, shape_of, signed, users_first

#: Entries of a tensor, True where one is reached: an axis for each of its own, of size 1 where all along it are alike.
Reach = Tensor
#: Of those that work on each entry by itself.
_ENTRYWISE = kinds(
    """
    Abs Acos Add Addcdiv Addcmul Alias Asin Asinh Atan Atan2 Celu Clamp ClampMax ClampMin Clone Copy Cos Cosh Elu Erf
    Erfc Exp Exp2 Expm1 Gelu Hardshrink Hardsigmoid Hardswish Hardtanh HardtanhBackward LeakyRelu Lerp Lgamma Log Log10
    Log1p Log2 LogSigmoid Logit Maximum Minimum Mish NanToNum NativeDropout Neg Pow PreluKernel Reciprocal Relu
    RreluWithNoise Rsqrt Rsub Selu Sgn Sigmoid Silu Sin Sinc Sinh Softplus Softshrink Softsign Sqrt Square Sub Tan Tanh
    Threshold ToCopy Xlogy
    """
)
#: Of those that mix all entries along some axes, which they keep.
_ALONG = kinds("Softmax LogSoftmax SafeSoftmax NativeLayerNorm FusedRmsNorm FusedRms")
#: Of those that move entries in ways that only they know, and are run to see: what is saved are sizes or indices.
_RUN = kinds(
    """
    AsStrided Diagonal Embedding IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl MaskedScatter PackPaddedSequence
    ReflectionPad1D ReplicationPad1D Rot90 Scatter ScatterAdd ScatterReduce SelectScatter SliceScatter Take Tril Triu
    Unfold torch::autograd::CopySlices
    """
)
#: Of those that are run likewise, of which every entry that they get goes into some that they give.
_SPREADING = kinds(
    """
    AdaptiveAvgPool2D AdaptiveAvgPool3D AvgPool2D AvgPool3D PixelShuffle PixelUnshuffle ReflectionPad2D
    ReplicationPad2D UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D
    UpsampleNearest3D UpsampleTrilinear3D
    """
)
#: Of those that read no tensor that was saved, which a checkpoint may hand out only once.
_PLAIN = kinds(
    """
    Cat ConstantPadNd Cumsum Expand Flip Mean Narrow Permute Repeat Reshape ReshapeAlias Roll Select Slice Split
    SplitWithSizes Squeeze Stack Sum T Transpose Unbind UnsafeView Unsqueeze View
    """
)


def reached_entries(
    last: Any, number: int, packed: bool, ends: Ends = (), seen: Reach | None = None
) -> dict[tuple[Any, int], Reach | None]:
    """What of each tensor in a graph reaches a result of its last node, by node and number; ``None``: all, or unknown.

    Tensors that are not in the result lead nowhere. Read are what picks or moves entries, constant masks with one
    number for each row of the last axis, those of attention, constant matrices, and windows of convolutions. What a
    value decides (a unit that is off, the weights that attention gives) leaves nothing out, but the place of a maximum
    does, which is an index.

    Args:
        last: The node.
        number: Of its result.
        packed: Saved tensors are packed, as in a checkpoint, so they may be asked for once: none is read.
        ends: Nodes below which nothing is looked at.
        seen: Entries of the result that count; ``None`` for all.
    """
    reached: dict[tuple[Any, int], Reach | None] = {(last, number): seen}
    is_end = asking(ends)
    with torch.no_grad():
        for node in users_first([last], is_end):
            if is_end(node):
                continue
            results = range(len(node._input_metadata))
            given = {number: reached[node, number] for number in results if (node, number) in reached}
            for key, found in _before(node, given, packed):
                reached[key] = _either(reached[key], found) if key in reached else found
    return reached


def _before(node: Any, given: dict[int, Reach | None], packed: bool) -> Iterator[tuple[tuple[Any, int], Reach | None]]:
    """What is reached of the tensors that a node gets, given what is of those that it gives."""
    if not given:
        return
    try:
        scores = None if packed else renormalised_scores(node)
    except RuntimeError:  # what it saved is gone
        scores = None
    if scores is not None:
        yield scores[0], scores[1] if (after := given[0]) is None else along(after, -1) & scores[1].to(after.device)
    for which, edge in enumerate(node.next_functions):
        if edge[0] is not None:
            shape = shape_of(*edge)
            if scores is not None:  # nothing but those
                yield edge, torch.zeros([1] * len(shape), dtype=torch.bool)
            else:
                found = _through(node, which, given, shape, packed)
                # What fits nowhere is a scale, in the place of what is scaled.
                yield edge, found if found is not None and _fits(found, shape) and not _is_all(found) else None


def _through(node: Any, which: int, given: dict[int, Reach | None], shape: Sequence[int], packed: bool) -> Reach | None:
    """What is reached of one of the tensors that a node gets, of some shape, given what is of those that it gives."""
    name = kind_of(node)
    if packed and name not in _PLAIN and not (name in _ENTRYWISE or name in _ALONG):
        return None
    try:
        if name in CUTS:
            return cut(node, given, shape)
        after = given.get(0)
        if len(given) > 1 or 0 not in given:
            return None
        if rule := PICKS.get(name) or PRODUCTS.get(name):
            return rule(node, which, after, shape)
        if name in _RUN or (name in _SPREADING and after is not None):
            return _run(node, which, after, shape)
        if name in SOFTMAX:
            shown = None if packed else unhidden_scores(node)
            after = None if after is None else along(after, *_axes(node, len(shape)))
            return shown if after is None else after if shown is None else after & shown.to(after.device)
        after = one_factor(node, which, after)
        if after is None:
            return None
        if name in MOVES:
            return MOVES[name](node, which, after, shape)
        if name in _ENTRYWISE or name in ("Expand", "Mul", "Div", "MaskedFill", "Where"):
            return spread(after, shape)
        return along(after, *_axes(node, len(shape))) if name in _ALONG else None
    except (RuntimeError, IndexError):  # what it saved is gone, or was changed since
        return None


def _axes(node: Any, axes: int) -> list[int]:
    """The axes along which a node mixes entries."""
    if (dim := getattr(node, "_saved_dim", None)) is not None:
        return [signed(dim) % axes]
    return list(range(axes - len(node._saved_normalized_shape), axes))


def _run(node: Any, which: int, after: Reach | None, shape: Sequence[int]) -> Reach | None:
    """What comes out of a node that moves entries if ones arrive where it is reached."""
    meta = node._input_metadata[0]
    ones = torch.ones((), dtype=meta.dtype, device=meta.device)
    sent = ones.expand(meta.shape) if after is None else after.to(meta.device).expand(meta.shape).to(meta.dtype)
    found = node(sent)
    one = found[which] if isinstance(found, tuple) else found
    if one is None or one.is_sparse:
        return None
    found = spread(one != 0, shape)
    if which == 0 and "CopySlices" in node.name() and found.dim() and bool((found != found[..., :1]).any()):
        return None  # units that are off, in place
    return found


def _fits(found: Reach, shape: Sequence[int]) -> bool:
    return found.dim() == len(shape) and all(a in (1, b) for a, b in zip(found.shape, shape, strict=True))


def _is_all(found: Reach) -> bool:
    """Whether nothing is left out, as far as is seen without waiting for a device."""
    return found.numel() == 1 and found.device.type == "cpu" and bool(found)


def _either(a: Reach | None, b: Reach | None) -> Reach | None:
    if a is None or b is None:
        return None
    return a if a is b else a | b.to(a.device)
