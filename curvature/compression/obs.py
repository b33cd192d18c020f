r"""Removing weights so that the error's quadratic form stays small: the optimal brain surgeon.

Of all changes that set the weights ``S`` of W to zero, the one with the least form
:math:`\tfrac12 \langle E, C E \rangle` costs :math:`\tfrac12 w_S^\top ([C^{-1}]_{SS})^{-1} w_S`; the others move to
make up for it. Which weights to remove is decided by this cost for one weight (or one group of N:M) at a time, in
several rounds; how the others move is then solved exactly for all that were removed together.

References:
    Hassibi and Stork (1992), "Optimal brain surgeon"; Frantar and Alistarh (2023), "SparseGPT",
    https://arxiv.org/abs/2301.00774; van der Ouderaa et al. (2024), "The LLM surgeon",
    https://arxiv.org/abs/2312.17244
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from curvature.compression.factors import LayerCurvature
from curvature.compression.pattern import Pattern
from solvers import CG, Function


def prune_matrix(
    W: Tensor,
    curvature: LayerCurvature,
    pattern: Pattern,
    free: int,
    rounds: int = 8,
    rtol: float = 1e-3,
    max_steps: int = 500,
) -> tuple[Tensor, Tensor]:
    """The pruned matrix ``(d_out, d_in + free)`` and its mask ``(d_out, d_in + free)``, True where a weight stays.

    Args:
        W: The weights; the last ``free`` columns (a bias) are never removed, except with their unit.
        curvature: Factors of the matrix.
        pattern: What is removed.
        free: Number of columns that are not pruned.
        rounds: In how many rounds the weights are chosen; between them the others make up for what is gone.
        rtol: Tolerance of the solve for the remaining weights.
        max_steps: Steps of that solve.
    """
    d_in = W.shape[1] - free
    if not pattern.fraction:
        return W, torch.ones_like(W, dtype=torch.bool)
    inverse = curvature.inputs.inverse.to(W.dtype)
    rows = curvature.outputs.inverse.diagonal().to(W.dtype) if curvature.outputs else W.new_ones(W.shape[0])
    mask = torch.ones_like(W, dtype=torch.bool)
    value = W
    for number in range(1, rounds + 1):
        share = number / rounds
        match pattern:
            case Pattern(units=True):
                mask = _units(value, curvature, rows, share * pattern.fraction)
            case Pattern(n=None):
                cost = value[:, :d_in].square() / (rows.unsqueeze(1) * inverse.diagonal()[:d_in])
                mask[:, :d_in] = _least(cost, share * pattern.fraction, mask[:, :d_in])
            case _:
                _n_of_m(value, mask, inverse, pattern, d_in, number, rounds)
        value = _surgeon(W, mask, curvature, rtol, max_steps)
    return value, mask


def _least(cost: Tensor, fraction: float, mask: Tensor) -> Tensor:
    """The mask without the given fraction of entries, those of the least cost; what is gone stays gone."""
    number = round(fraction * cost.numel())
    cost = torch.where(mask, cost, -1.0).flatten()
    out = torch.ones_like(cost, dtype=torch.bool)
    out[torch.argsort(cost, stable=True)[:number]] = False
    return out.view(mask.shape)


def _units(W: Tensor, curvature: LayerCurvature, rows: Tensor, fraction: float) -> Tensor:
    """The mask without whole rows: a unit's cost is ``w^T A w / [B^-1]_ii``."""
    A = curvature.inputs.matrix.to(W.dtype)
    cost = ((W @ A) * W).sum(1) / rows
    gone = torch.argsort(cost, stable=True)[: round(fraction * len(cost))]
    out = torch.ones_like(W, dtype=torch.bool)
    out[gone] = False
    return out


def _n_of_m(W: Tensor, mask: Tensor, inverse: Tensor, pattern: Pattern, d_in: int, number: int, rounds: int) -> None:
    """Choose the best of all patterns for each group of this round's share of the groups, in place.

    Every removal set S of a group is tried: its cost is ``w_S^T ([A^-1]_SS)^-1 w_S`` for every row at once.
    """
    n, m = pattern.of_m
    groups = d_in // m
    first, last = groups * (number - 1) // rounds, groups * number // rounds
    if first == last:
        return
    removed = torch.tensor(list(combinations(range(m), m - n)), device=W.device)  # (patterns, m - n)
    index = torch.arange(first * m, last * m, device=W.device).view(-1, 1, m).expand(-1, len(removed), m)
    index = index.gather(2, removed.expand(len(index), *removed.shape))  # (groups, patterns, m - n)
    blocks = inverse[index.unsqueeze(-1), index.unsqueeze(-2)]
    w = W[:, index]  # (d_out, groups, patterns, m - n)
    cost = torch.einsum("ogpi,gpij,ogpj->ogp", w, torch.linalg.inv(blocks), w)
    best = cost.argmin(-1)  # (d_out, groups)
    gone = index[torch.arange(len(index), device=W.device), best]  # (d_out, groups, m - n)
    mask.scatter_(1, gone.flatten(1), False)


def _surgeon(W: Tensor, mask: Tensor, curvature: LayerCurvature, rtol: float, max_steps: int) -> Tensor:
    r"""The weights with the given support that are nearest to W in the form of C.

    Solves :math:`M (B X A) = M (B W A)` for X on the support M, by conjugate gradients, preconditioned by the inverse
    of C on the support.
    """

    def both_sides(left: Tensor | None, X: Tensor, right: Tensor) -> Tensor:
        return mask * ((X if left is None else left @ X) @ right)

    inputs, outputs = curvature.inputs, curvature.outputs
    A, A_inverse = inputs.matrix.to(W.dtype), inputs.inverse.to(W.dtype)
    B, B_inverse = (None, None) if outputs is None else (m.to(W.dtype) for m in (outputs.matrix, outputs.inverse))

    def on_support(left: Tensor | None, right: Tensor) -> Function:
        return Function(
            lambda X: both_sides(left, X, right), tuple(W.shape), symmetric=True, dtype=W.dtype, device=W.device
        )

    op, inverse = on_support(B, A), on_support(B_inverse, A_inverse)
    # From the weights as they are: X = M W + D, with M (B D A) = M (B (W - M W) A).
    solver = CG(rtol=rtol, max_steps=max_steps, preconditioner=inverse, progress=False)
    return W * mask + solver.solve(op, op @ (W * ~mask))
