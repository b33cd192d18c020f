"""Which keys and values of an attention are reached: not those that its constant mask hides from every query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.model.graph_nodes import below, edges_of, kept, kind_of, kinds, shape_of

#: Names of nodes.
SOFTMAX = ("Softmax", "SafeSoftmax")
#: Of nodes between a softmax and the product with the values: shapes, casts and dropout.
_BETWEEN = kinds(
    "View UnsafeView Expand Reshape Unsqueeze Squeeze Permute Transpose ToCopy Alias Clone NativeDropout Mul Div"
)
#: Of those between weights and what they are divided by, so that they add up to one.
_SUMS = kinds("Sum LinalgVectorNorm Abs Add Clamp ClampMin Expand Unsqueeze")
#: At most so many of them.
_FEW = 8


def unhidden_columns(node: Any) -> Tensor | None:
    """Columns ``(*, 1, s)`` of a softmax over its last axis that are not hidden from all rows by a constant.

    Weights that are zero by their values alone hide nothing.

    Args:
        node: Of the softmax.

    Returns:
        True where a column counts; ``None`` if all do, or where nothing is masked.
    """
    result: Tensor = kept(node, "_saved_result")
    last = node._saved_dim in (result.dim() - 1, 2**64 - 1, -1)
    if result.dim() < 3 or not last or not _masked(node.next_functions[0][0]):
        return None
    used = (result != 0).any(-2, keepdim=True)
    return None if bool(used.all()) else used


def weighted_rows(weights: Tensor | None, node: Any) -> Tensor | None:
    """Rows ``(*, s, 1)`` of values that the weights of an attention do not all hide; ``None`` for all.

    Args:
        weights: ``(*, q, s)``, of the product with the values.
        node: That made them.
    """
    if weights is None:
        return None
    for _ in range(_FEW):
        kind, arguments = kind_of(node), [child for child, _ in edges_of(node)]
        if kind in SOFTMAX:
            shown = unhidden_columns(node)
        else:
            shown = _left(node) if (scores := renormalised_scores(node)) is None else scores[1]
        if shown is not None:
            used, shown = ((one != 0).any(-2).unsqueeze(-1) for one in (weights, shown))
            # Of other shares of columns, dropout or the values have hidden some, or they are those of something else.
            return used if int(used.sum()) * shown.numel() == int(shown.sum()) * used.numel() else None
        if kind not in _BETWEEN or len(arguments) != 1:
            return None
        node = arguments[0]
    return None


def renormalised_scores(node: Any) -> tuple[tuple[Any, int], Tensor] | None:
    """Scores ``(*, q, s)`` some of which a constant hides, where a quotient makes their weights add up to one.

    What is masked after a softmax cancels in the quotient, and in no step before it: all that leads from the scores
    there counts as one operation. So does a softmax that is written out as a quotient of exponentials.

    Args:
        node: Of the quotient.

    Returns:
        The scores, as a node and the number of its result, and the columns ``(*, 1, s)`` that count; ``None`` of
        other quotients.
    """
    if kind_of(node) != "Div" or len(edges_of(node)) != 2:
        return None
    (whole, number), (total, _) = node.next_functions
    if any(kind_of(one) not in _SUMS for one in below([total], (whole,).__contains__) if one is not whole):
        return None
    parts, total = kept(node, "_saved_self"), kept(node, "_saved_other")
    if parts.dim() < 3:
        return None
    ones = (parts.sum(-1, keepdim=True) / total - 1).abs() < torch.finfo(parts.dtype).eps ** 0.5
    if not bool((ones | (total.abs() < torch.finfo(parts.dtype).eps)).all()):
        return None
    shown = _left(whole)
    if shown is not None:
        whole, number = edges_of(whole)[0]
    elif kind_of(whole) == "Exp" and _masked(edges_of(whole)[0][0]):
        shown = (parts != 0).any(-2, keepdim=True)
    if shown is None or bool(shown.all()):
        return None
    return edges_of(whole)[0] if kind_of(whole) in SOFTMAX else (whole, number), shown


def attended_rows(node: Any) -> Tensor | None:
    """Rows of keys and values ``(n or 1, 1, s, 1)`` that the mask of an attention kernel leaves; ``None`` for all."""
    found = (kept(node, name) for name in ("_saved_attn_mask", "_saved_attn_bias") if hasattr(type(node), name))
    mask = next((one for one in found if one is not None), None)
    if mask is None or not 2 <= mask.dim() <= 4:
        return None
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    shown = shown[(None,) * (4 - shown.dim())].any(-2).any(1)  # (n or 1, s)
    return None if bool(shown.all()) else shown[:, None, :, None]


def _masked(node: Any) -> bool:
    """Whether a constant was filled in or added before, as masks are; scales and learned biases may follow it."""
    nodes = [node]
    for _ in range(_FEW):
        if not nodes:
            return False
        node = nodes.pop(0)
        children = [child for child, _ in node.next_functions]
        kind = kind_of(node)
        if kind in ("MaskedFill", "Where"):
            return _hides(node, kind)
        if kind in ("Add", "Baddbmm") and None in children:
            return True
        if kind in _BETWEEN or kind in ("Add", "Sub"):
            nodes += [child for child in children if child is not None]
    return False


def _hides(node: Any, kind: str) -> bool:
    """Whether a mask may hide a column from all rows, which a causal one does not: it is smaller than the weights."""
    shown = _unfilled(node, kind)
    return shown.dim() < 2 or not bool(shown.any(-2).all())


def _left(node: Any) -> Tensor | None:
    """Columns ``(*, 1, s)`` of weights that a constant factor or mask leaves; ``None`` if it is none, or leaves all."""
    kind, sizes = kind_of(node), shape_of(node)
    if kind not in ("Mul", "MaskedFill", "Where") or len(edges_of(node)) != 1 or len(sizes) < 3:
        return None
    if kind == "Mul":
        shown = kept(node, "_saved_self" if node.next_functions[0][0] is None else "_saved_other")
        if not isinstance(shown, Tensor):
            return None
        shown = shown != 0
    else:
        shown = _unfilled(node, kind)
    shown = shown[(None,) * (len(sizes) - shown.dim())].any(-2, keepdim=True)
    return None if bool(shown.all()) or shown.shape[-1] == 1 else shown


def _unfilled(node: Any, kind: str) -> Tensor:
    """True where a node fills nothing in."""
    if kind == "MaskedFill":
        return ~kept(node, "_saved_mask")
    shown: Tensor = kept(node, "_saved_condition")
    return ~shown if node.next_functions[0][0] is None else shown
