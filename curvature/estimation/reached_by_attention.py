"""Which keys and values of an attention are reached: not those that its constant mask hides from every query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.model.graph_nodes import kept, name_of

#: Names of nodes.
SOFTMAX = ("Softmax", "SafeSoftmax")
#: Of nodes between a softmax and the product with the values: shapes, casts and dropout.
_BETWEEN = frozenset(
    (
        *("View", "UnsafeView", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Permute", "Transpose"),
        *("ToCopy", "Alias", "Clone", "NativeDropout", "Mul", "Div"),
    )
)
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
    for _ in range(_FEW):
        kind = name_of(node).partition("Backward")[0]
        arguments = [child for child, _ in node.next_functions if child is not None]
        if kind in SOFTMAX:
            shown = unhidden_columns(node)
            used = None if shown is None or weights is None else (weights != 0).any(-2).unsqueeze(-1)
            # Of other numbers of columns, dropout or the values have hidden some, or they are those of something else.
            return used if used is not None and shown is not None and int(used.sum()) == int(shown.sum()) else None
        if kind not in _BETWEEN or len(arguments) != 1:
            return None
        node = arguments[0]
    return None


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
        kind = name_of(node).partition("Backward")[0]
        if kind in ("MaskedFill", "Where"):
            return _hides(node, kind)
        if kind in ("Add", "Baddbmm") and None in children:
            return True
        if kind in _BETWEEN or kind == "Add":
            nodes += [child for child in children if child is not None]
    return False


def _hides(node: Any, kind: str) -> bool:
    """Whether a mask may hide a column from all rows, which a causal one does not: it is smaller than the weights."""
    if kind == "MaskedFill":
        hidden: Tensor = kept(node, "_saved_mask")
    else:
        shown = kept(node, "_saved_condition")
        hidden = shown if node.next_functions[0][0] is None else ~shown
    return hidden.dim() < 2 or bool(hidden.all(-2).any())
