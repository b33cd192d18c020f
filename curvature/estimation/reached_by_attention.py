"""Which keys and values of an attention are reached: not those that its constant mask hides from every query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.model.graph_nodes import below, edges_of, factor_of, kept, kind_of, kinds, shape_of, signed

#: Names of nodes.
SOFTMAX = ("Softmax", "SafeSoftmax")
#: Of nodes between a softmax and the product with the values: shapes, casts and dropout.
_BETWEEN = kinds(
    "View UnsafeView Expand Reshape Unsqueeze Squeeze Select Permute Transpose ToCopy Alias Clone NativeDropout Mul Div"
)
#: Of those between weights and what they are divided by, so that they add up to one.
_SUMS = kinds("Sum LinalgVectorNorm Abs Add Clamp ClampMin Expand Unsqueeze")
#: Of those that may set numbers to zero, or others.
_MASKS = ("Mul", "MaskedFill", "Where")
#: At most so many of them.
_FEW = 8


def unhidden_scores(node: Any) -> Tensor | None:
    """Scores of a softmax that are not hidden by a constant: columns ``(*, 1, s)`` of those ``(*, q, s)``.

    Over another axis than the last, or the last of two, as in pooling by attention, each is hidden for itself. Weights
    that are zero by their values alone hide nothing.

    Args:
        node: Of the softmax.

    Returns:
        True where a score counts; ``None`` if all do, or where nothing is masked.
    """
    result: Tensor = kept(node, "_saved_result")
    looks = result.dim() > 2 and signed(node._saved_dim) % result.dim() == result.dim() - 1
    if not _masked(node.next_functions[0][0], looks):
        return None
    used = result != 0
    used = used.any(-2, keepdim=True) if looks else used
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
            shown = unhidden_scores(node)
        else:
            scores = renormalised_scores(node)
            shown = _left(node, len(shape_of(node)) > 2) if scores is None else scores[1]
        if shown is not None:
            used = (weights != 0).any(-2).unsqueeze(-1)
            # Of other shares of columns, dropout or the values have hidden some, or they are those of something else.
            return used if int(used.sum()) * shown.numel() == int(shown.sum()) * used.numel() else None
        if kind not in _BETWEEN or len(arguments) != 1:
            return None
        node = arguments[0]
    return None


def renormalised_scores(node: Any) -> tuple[tuple[Any, int], Tensor] | None:
    """Scores some of which a constant hides, where a quotient makes their weights add up to one.

    What is masked after a softmax cancels in the quotient, and in no step before it: all that leads from the scores
    there counts as one operation. So does a softmax that is written out as a quotient of exponentials.

    Args:
        node: Of the quotient.

    Returns:
        The scores, as a node and the number of its result, and those that count, as in :func:`unhidden_scores`;
        ``None`` of other quotients.
    """
    if kind_of(node) != "Div" or len(edges_of(node)) != 2:
        return None
    (whole, number), (total, _) = node.next_functions
    if kind_of(whole) not in ("Exp", *_MASKS):
        return None
    if any(kind_of(one) not in _SUMS for one in below([total], (whole,).__contains__) if one is not whole):
        return None
    parts, total = kept(node, "_saved_self"), kept(node, "_saved_other")
    axis = next((k for k in range(-1, -parts.dim() - 1, -1) if _is_one(parts.sum(k, keepdim=True), total)), None)
    if axis is None:
        return None
    looks = parts.dim() > 2 and axis == -1
    shown = _left(whole, looks)
    if shown is not None:
        whole, number = edges_of(whole)[0]
    elif kind_of(whole) == "Exp" and _masked(edges_of(whole)[0][0], looks):
        shown = (parts != 0).any(-2, keepdim=True) if looks else parts != 0
    if shown is None or bool(shown.all()) or bool(((parts != 0) & ~shown).any()):
        return None
    return edges_of(whole)[0] if kind_of(whole) in SOFTMAX else (whole, number), shown


def _is_one(sums: Tensor, totals: Tensor) -> bool:
    """Whether sums are what they are divided by, or nothing is left of them."""
    eps = torch.finfo(sums.dtype).eps
    return bool((((sums / totals - 1).abs() < eps**0.5) | (totals.abs() < eps)).all())


def attended_rows(node: Any) -> Tensor | None:
    """Rows of keys and values ``(n or 1, 1, s, 1)`` that the mask of an attention kernel leaves; ``None`` for all."""
    found = (kept(node, name) for name in ("_saved_attn_mask", "_saved_attn_bias") if hasattr(type(node), name))
    mask = next((one for one in found if one is not None), None)
    if mask is None or not 2 <= mask.dim() <= 4:
        return None
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    shown = shown[(None,) * (4 - shown.dim())].any(-2).any(1)  # (n or 1, s)
    return None if bool(shown.all()) else shown[:, None, :, None]


def _masked(node: Any, looks: bool) -> bool:
    """Whether a constant was filled in or added before, as masks are; scales and learned biases may follow it.

    Args:
        node: That made the scores.
        looks: Many look at each, along the axis before the last.
    """
    nodes = [node]
    for _ in range(_FEW):
        if not nodes:
            return False
        node = nodes.pop(0)
        children = [child for child, _ in node.next_functions]
        kind = kind_of(node)
        if kind in _MASKS[1:]:
            return _left(node, looks) is not None
        if kind in ("Add", "Baddbmm") and None in children:
            return True
        if kind in _BETWEEN or kind in ("Add", "Sub"):
            nodes += [child for child in children if child is not None]
    return False


def _left(node: Any, looks: bool) -> Tensor | None:
    """Those of scores, or weights, that a constant leaves, as in :func:`unhidden_scores`; ``None`` if it leaves all.

    A causal mask leaves all: it hides no column from all rows.
    """
    which = [number for number, (child, _) in enumerate(node.next_functions) if child is not None]
    shown = factor_of(node, which[0]) if len(which) == 1 else None
    if shown is None:
        return None
    shown = shown[(None,) * (len(shape_of(node)) - shown.dim())] != 0
    shown = shown.any(-2, keepdim=True) if looks else shown
    return None if bool(shown.all()) else shown
