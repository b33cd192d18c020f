r"""Rounding a matrix so that the error's quadratic form stays small.

With :math:`A = U_A D_A U_A^\top` and :math:`B = U_B D_B U_B^\top`, U unit lower triangular, the form of an error
:math:`E = W - \hat W` is

.. math::
    \operatorname{tr}(B E A E^\top) = \sum_{ij} (D_B)_i (D_A)_j\, T_{ij}^2, \qquad T = U_B^\top E\, U_A,

and :math:`T_{ij}` depends on errors right of and below ``(i, j)`` alone. So entries are rounded from the last to the
first, each to the level nearest to its weight plus what the errors before it add: Babai's nearest plane. With the
identity for B this is GPTQ.

References:
    Frantar et al. (2022), "GPTQ", https://arxiv.org/abs/2210.17323; Tseng et al. (2025), "Model-preserving adaptive
    rounding", https://arxiv.org/abs/2505.22988; Chen et al. (2025), "The geometry of LLM quantization",
    https://arxiv.org/abs/2507.18553
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.compression.factors import LayerCurvature
from curvature.compression.grid import Levels

_BLOCK = 128


def round_matrix(
    W: Tensor, levels: Levels, curvature: LayerCurvature, free: int = 0, by_activation: bool = True
) -> Tensor:
    r"""The rounded matrix ``(d_out, d_in + free)``.

    Args:
        W: ``(d_out, d_in + free)``; the last ``free`` columns (a bias) are not rounded. They come last and take up what
            they can of the errors.
        levels: Levels of the first ``d_in`` columns.
        curvature: Factors of the matrix.
        free: Number of columns that stay off the grid.
        by_activation: Round the inputs with the smallest second moment first, so that those with the largest can make
            up for them; else from the last to the first.
    """
    d_in = W.shape[1] - free
    A = curvature.inputs
    columns = torch.arange(d_in, device=W.device)
    if by_activation:
        columns = torch.argsort(A.matrix.diagonal()[:d_in], descending=True, stable=True)
    order = torch.cat([torch.arange(d_in, d_in + free, device=W.device), columns])
    U = A.permuted(order).unit.to(W.dtype)
    rows = None if curvature.outputs is None else curvature.outputs.unit.to(W.dtype)
    padding = torch.ones(W.shape[0], free, dtype=W.dtype, device=W.device)
    sorted_levels = Levels(
        torch.cat([padding, levels.scale[:, columns].to(W.dtype)], dim=1),
        torch.cat([padding, levels.zero[:, columns].to(W.dtype)], dim=1),
        levels.bits,
    )
    out = torch.empty_like(W)
    out[:, order] = _sweep(W[:, order], sorted_levels, U, rows, free)
    return out


def _sweep(W: Tensor, levels: Levels, U: Tensor, V: Tensor | None, free: int) -> Tensor:
    """Round from the last column to the first, in blocks of columns; ``V`` couples the rows.

    The errors of later columns act on a block by one matrix product, as do later rows on a block of rows.
    """
    d_out, d_in = W.shape
    error, rounded = torch.zeros_like(W), torch.empty_like(W)
    for stop in range(d_in, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        J = slice(start, stop)
        beyond = error[:, stop:] @ U[stop:, J]  # what the columns to the right add, by row
        if V is None:
            _columns(W, levels, U, beyond, error, rounded, J, free)
            continue
        through = torch.empty_like(beyond)  # E U of the rows below, columns J
        for end in range(d_out, 0, -_BLOCK):
            first = max(end - _BLOCK, 0)
            I = slice(first, end)
            added = V[I, I].mT @ beyond[I] + V[end:, I].mT @ through[end:]
            tile = _tile(W[I, J] + added, W[I, J], levels, U[J, J], V[I, I], I, J, free)
            rounded[I, J] = tile
            error[I, J] = W[I, J] - tile
            through[I] = beyond[I] + error[I, J] @ U[J, J]
    return rounded


def _columns(
    W: Tensor, levels: Levels, U: Tensor, beyond: Tensor, error: Tensor, rounded: Tensor, J: slice, free: int
) -> None:
    """One block of columns where rows do not act on each other: column by column, all rows at once."""
    for j in range(J.stop - 1, J.start - 1, -1):
        later = slice(j + 1, J.stop)
        x = W[:, j] + beyond[:, j - J.start] + error[:, later] @ U[later, j]
        rounded[:, j] = x if j < free else levels.nearest(x, j)  # type: ignore[arg-type]
        error[:, j] = W[:, j] - rounded[:, j]


def _tile(
    x: Tensor,
    W: Tensor,
    levels: Levels,
    U: Tensor,
    V: Tensor,
    I: slice,
    J: slice,
    free: int,
) -> Tensor:
    """One tile ``(m, n)``: entries on an antidiagonal do not act on each other and are rounded together.

    ``x`` holds the weights and all that comes from outside of the tile. Columns are stored in reverse, so that an
    antidiagonal ``(lo + k, hi - k)`` is a run along both axes.
    """
    m, n = W.shape
    scale, zero = levels.scale[I, J].flip(1), levels.zero[I, J].flip(1)
    x, W = x.flip(1), W.flip(1)
    free = max(min(free - J.start, n), 0)  # columns of this tile that stay off the grid: the last ones, in reverse
    E = torch.zeros_like(W)
    right = U.flip(0, 1).mT.contiguous()  # row j: how the errors of all columns act on column j
    below = V.mT.contiguous()  # row i: how the rows act on row i
    EU = torch.zeros_like(W).mT.contiguous()  # by column
    out = torch.empty_like(W)
    top = 2**levels.bits - 1
    for step in range(m + n - 1):
        # Row i = m - 1 - step + c meets reversed column c.
        lo = max(0, m - 1 - step)
        hi = min(m, m + n - 1 - step)
        c = lo - (m - 1 - step)
        length = hi - lo
        I_, J_ = slice(lo, hi), slice(c, c + length)
        from_right = (E[I_] * right[J_]).sum(1)
        from_below = (below[I_] * EU[J_]).sum(1)
        target = x[I_, J_].diagonal() + from_right + from_below
        s, z = scale[I_, J_].diagonal(), zero[I_, J_].diagonal()
        value = (torch.clamp(torch.round(target / s) + z, 0, top) - z) * s
        if free and c + length > n - free:
            keep = n - free - c if n - free > c else 0
            value = torch.cat([value[:keep], target[keep:]])
        out[I_, J_].diagonal().copy_(value)
        e = W[I_, J_].diagonal() - value
        E[I_, J_].diagonal().copy_(e)
        EU[J_, I_].diagonal().copy_(from_right + e)
    return out.flip(1)
