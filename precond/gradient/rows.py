"""NorMuon's normalisation of the rows of a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.gradient.optimizer import Group, State, state_zeros
from precond.step.norm_control import is_matrix


def row_state(p: Tensor, group: Group) -> State:
    """The mean squares of the rows before the first step, of a parameter that has rows."""
    if group.get("row_normalization") is None or not is_matrix(p):
        return {}
    lead = 2 if group.get("stacked") and p.ndim > 2 else 1
    return {"row_sq": state_zeros(p, (*p.shape[:lead], *[1] * (p.ndim - lead)))}


def normalized_rows(direction: Tensor, state: State, group: Group) -> Tensor:
    r"""Directions whose rows are divided by the root of their mean squares over the steps, at the same norm.

    .. math:: v_i \leftarrow \beta v_i + (1 - \beta) \tfrac1n \textstyle\sum_j D_{ij}^2, \qquad
        D'_{ij} = D_{ij} / \sqrt{v_i}, \qquad D \leftarrow D'\, \lVert D \rVert / \lVert D' \rVert

    The bias of an average that begins at zero is a common factor, which cancels.

    Args:
        direction: ``(k, *shape)``.
        state: Of the stack; ``row_sq`` is v, and is replaced.
        group: Options; ``row_normalization`` is :math:`\beta`.

    References:
        Li et al. (2025), NorMuon, algorithm 1, https://arxiv.org/abs/2510.05491
    """
    stacked = group.get("stacked") and direction.ndim > 3
    matrix = tuple(range(direction.ndim - 2 if stacked else 1, direction.ndim))
    means = direction.square().mean(matrix[1:], keepdim=True)
    squares = state["row_sq"] = state["row_sq"].lerp(means, 1 - group["row_normalization"])
    out = direction * torch.where(squares > 0, squares.rsqrt(), 0)
    size, new = (torch.linalg.vector_norm(x, dim=matrix, keepdim=True) for x in (direction, out))
    return out * (size / torch.where(new == 0, 1, new))
