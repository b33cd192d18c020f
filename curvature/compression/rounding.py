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
    if rows is None:
        out[:, order] = _by_columns(W[:, order], sorted_levels, U, free)
    else:
        out[:, order] = _by_tiles(W[:, order], sorted_levels, U, rows, free)
    return out


def _by_columns(W: Tensor, levels: Levels, U: Tensor, free: int) -> Tensor:
    """Round where rows do not act on each other: column by column, all rows at once.

    What the columns of later blocks add to a block is one matrix product.
    """
    error, rounded = torch.zeros_like(W), torch.empty_like(W)
    for stop in range(W.shape[1], 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        beyond = error[:, stop:] @ U[stop:, start:stop]
        for j in range(stop - 1, start - 1, -1):
            x = W[:, j] + beyond[:, j - start] + error[:, j + 1 : stop] @ U[j + 1 : stop, j]
            rounded[:, j] = x if j < free else levels.nearest(x, j)  # type: ignore[arg-type]
            error[:, j] = W[:, j] - rounded[:, j]
    return rounded


def _by_tiles(W: Tensor, levels: Levels, U: Tensor, V: Tensor, free: int) -> Tensor:
    """Round where columns act on each other by ``U`` and rows by ``V``.

    Tiles on an antidiagonal do not act on each other and are rounded together, as are, inside of a tile, entries on an
    antidiagonal. What a finished tile adds to those left of it and above it are matrix products.
    """
    b = min(_BLOCK, max(W.shape))
    height, width = W.shape
    W, U, V = _padded(W, b, 0.0), _padded(U, b, 0.0), _padded(V, b, 0.0)
    scale, zero = _padded(levels.scale, b, 1.0), _padded(levels.zero, b, 0.0)
    off = torch.zeros(W.shape[1], dtype=torch.bool, device=W.device)
    off[:free] = True
    row_blocks, column_blocks = W.shape[0] // b, W.shape[1] // b
    rounded = torch.zeros_like(W)
    beyond = torch.zeros_like(W)  # what errors to the right add, by row: E U without the tile's own share
    below = torch.zeros_like(W)  # what rows of the tiles below add
    for front in range(row_blocks + column_blocks - 2, -1, -1):
        firsts = range(max(0, front - column_blocks + 1), min(row_blocks, front + 1))
        tiles = [(slice(i * b, i * b + b), slice((front - i) * b, (front - i) * b + b)) for i in firsts]

        def stack(matrix: Tensor, tiles: list[tuple[slice, slice]] = tiles) -> Tensor:
            return torch.stack([matrix[I, J] for I, J in tiles])

        right = torch.stack([U[J, J] for _, J in tiles])
        down = torch.stack([V[I, I] for I, _ in tiles])
        w = stack(W)
        x = w + down.mT @ stack(beyond) + stack(below)
        grid = Levels(stack(scale), stack(zero), levels.bits)
        values = _tiles(x, w, grid, right, down, torch.stack([off[J] for _, J in tiles]))
        errors = w - values
        through = stack(beyond) + errors @ right
        for (I, J), value, error, product in zip(tiles, values, errors, through, strict=True):
            rounded[I, J] = value
            beyond[I, : J.start] += error @ U[J, : J.start]
            below[: I.start, J] += V[I, : I.start].mT @ product
    return rounded[:height, :width]


def _padded(matrix: Tensor, multiple: int, value: float) -> Tensor:
    rows, columns = (-size % multiple for size in matrix.shape)
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows), value=value)


def _tiles(x: Tensor, W: Tensor, levels: Levels, U: Tensor, V: Tensor, off: Tensor) -> Tensor:
    """Round tiles ``(t, b, b)`` that do not act on each other.

    ``x`` holds the weights and all that comes from outside of each tile; ``off (t, b)`` marks columns that stay off the
    grid. Columns are stored in reverse, so that an antidiagonal is a run along both axes: row ``b - 1 - step + c``
    meets column c of those in reverse.
    """
    b = W.shape[-1]
    x, W, off = x.flip(2), W.flip(2), off.flip(1)
    scale, zero = levels.scale.flip(2), levels.zero.flip(2)
    right = U.flip(1, 2).mT.contiguous()  # row j: how the errors of all columns act on column j
    down = V.mT.contiguous()  # row i: how the rows act on row i
    E = torch.zeros_like(W)
    EU = torch.zeros_like(W)  # by column
    out = torch.empty_like(W)
    top = 2**levels.bits - 1
    for step in range(2 * b - 1):
        first = max(0, b - 1 - step)
        length = min(step + 1, 2 * b - 1 - step)
        c = first - (b - 1 - step)
        I, J = slice(first, first + length), slice(c, c + length)

        def along(matrix: Tensor, I: slice = I, J: slice = J) -> Tensor:
            return matrix[:, I, J].diagonal(dim1=1, dim2=2)

        from_right = (E[:, I] * right[:, J]).sum(2)
        target = along(x) + from_right + (down[:, I] * EU[:, J]).sum(2)
        s, z = along(scale), along(zero)
        value = torch.where(off[:, J], target, (torch.clamp(torch.round(target / s) + z, 0, top) - z) * s)
        error = along(W) - value
        along(out).copy_(value)
        along(E).copy_(error)
        EU[:, J, I].diagonal(dim1=1, dim2=2).copy_(from_right + error)
    return out.flip(2)
