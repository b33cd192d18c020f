"""Which entries are reached of the factors of a product or a convolution, or of what is multiplied by a mask.

What a constant factor is zero for is left out, and what a constant mask hides from an attention; of other values that
weights sum up which the model computes a signal alone tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.reached_by_attention import attended_rows, weighted_rows
from curvature.estimation.reached_by_moves import Rule, along, spread
from curvature.model.graph_nodes import factor_of, kept, origin_of_moves, shape_of, signed


def one_factor(node: Any, which: int, after: Tensor | None) -> Tensor | None:
    """What is reached of one that a node masks, or multiplies by a number for each row of its last axis: not by zero.

    So does a gate, whatever it was made of. Factors of single entries are units that are on or off, as values decide.
    """
    own = factor_of(node, which)
    if own is None or not own.dim():
        return after
    sizes = shape_of(node)
    own = own[(None,) * (len(sizes) - own.dim())]
    if not all(size == 1 or stride == 0 for size, stride in zip(own.shape[-1:], own.stride()[-1:], strict=True)):
        return after  # of units, as values decide
    own = own[..., :1] if own.shape[-1] else own
    if own.numel() == 1:
        return after
    own = own if own.dtype == torch.bool else own != 0
    return own if after is None else after & own.to(after.device)


def _of_product(factors: tuple[str, str], first: int) -> Rule:
    """A rule for ``A B``, of which the node keeps the factors under some names, from its argument ``first`` on."""

    def rule(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        if which < first:
            return None if after is None else spread(after, shape)
        left = which == first
        other, (child, _) = factors[left], node.next_functions[first + left]
        if child is None:
            return _by_constant(kept(node, other), left, after, shape)
        if after is None:
            return None if left else weighted_rows(kept(node, other), child)
        if left:  # of rows, the queries
            return along(after, -1)
        if _is_leaf(child):
            return along(after, -2)
        return after.new_zeros([1] * len(shape))

    return rule


def _is_leaf(node: Any) -> bool:
    start = origin_of_moves(node)
    return start is not None and "AccumulateGrad" in start.name()


def _by_constant(factor: Tensor | None, left: bool, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Of one factor, where the other is constant: rows of that which are zero are left out."""
    if factor is None:
        return None
    full = factor != 0
    if after is None:
        used = full.any(-1).unsqueeze(-2) if left else full.any(-2).unsqueeze(-1)
        return None if bool(used.all()) else used
    if left:  # R(A)[i, k] = any_j R[i, j] F[k, j]
        used = full.any(-1).unsqueeze(-2)
        if bool(used.all()) and after.shape[-1] == 1:
            return after
        return after.any(-1, keepdim=True) & used if after.shape[-1] == 1 else (after.float() @ full.mT.float()) > 0
    if after.shape[-2] == 1:
        return after & full.any(-2).unsqueeze(-1)
    return (full.mT.float() @ after.float()) > 0  # R(B)[k, j] = any_i F[i, k] R[i, j]


def _vector(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """A matrix and a vector."""
    if which:
        return None if after is None else after.new_zeros(1)
    rows = None if after is None else after.unsqueeze(-1)
    if node.next_functions[1][0] is not None:
        return rows
    used = (kept(node, "_saved_vec") != 0).unsqueeze(0)
    return used if rows is None else rows & used


def _second(node: Any) -> Tensor:
    found: Tensor = kept(node, "_saved_tensor" if hasattr(type(node), "_saved_tensor") else "_saved_other")
    return found


def _dot(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Two vectors."""
    if node.next_functions[1 - which][0] is not None:
        return None if after is None else after.reshape(1)
    used = (kept(node, "_saved_self") if which else _second(node)) != 0
    return used if after is None else used & after


def _looks(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Attention: rows of queries as they are."""
    if after is None:
        return attended_rows(node) if which in (1, 2) else None
    return along(after, -1) if which == 0 else after.new_zeros([1] * len(shape))


def _layer(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    return None if which or after is None else along(after, -1)


def _convolved(node: Any, which: int, after: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Places that windows reach, of all channels; what strides alone leave out of a whole image counts."""
    if which or after is None or bool(after.all()):
        return None
    weight = kept(node, "_saved_weight")
    one = torch.ones((), dtype=weight.dtype, device=weight.device)
    sent = after.any(1, keepdim=True).to(weight).expand(-1, -1, *shape_of(node)[2:])
    images, window = one.expand(len(after), 1, *shape[2:]), one.expand(1, 1, *weight.shape[2:])
    how = [[signed(n) for n in getattr(node, f"_saved_{name}")] for name in ("stride", "padding", "dilation")]
    turned, extra = node._saved_transposed, [signed(n) for n in node._saved_output_padding]
    wanted = [True, False, False]
    return torch.ops.aten.convolution_backward(sent, images, window, None, *how, turned, extra, 1, wanted)[0] > 0.5


#: By the name of a node.
PRODUCTS: dict[str, Rule] = {
    "Mm": _of_product(("_saved_self", "_saved_mat2"), 0),
    "Bmm": _of_product(("_saved_self", "_saved_mat2"), 0),
    "Addmm": _of_product(("_saved_mat1", "_saved_mat2"), 1),
    "Baddbmm": _of_product(("_saved_batch1", "_saved_batch2"), 1),
    "Mv": _vector,
    **dict.fromkeys(("Dot", "Vdot"), _dot),
    **dict.fromkeys(("Linear", "MkldnnLinear"), _layer),
    "Convolution": _convolved,
    **{f"ScaledDotProduct{how}": _looks for how in ("AttentionMath", "FlashAttention", "FlashAttentionForCpu")},
    **{f"ScaledDotProduct{how}": _looks for how in ("EfficientAttention", "CudnnAttention", "FusedAttention")},
}
