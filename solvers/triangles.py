"""Products with one triangle to compute: Gram matrices, whose other one is its mirror image, and factors like L^T.

Large Gram matrices are split in halves, down to parts that run at the speed of large products: two levels cost 5/8 of
the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Parts up to this size are multiplied whole: smaller ones run below the speed of large products.
_WHOLE = 256
# Rows of a triangle that are multiplied at once, where it has more than so many.
_BAND, _NO_BANDS = 96, 160
# Of Gram matrices of a number of rows in this range also half as large ones: of fewer rows, parts are bound by what
# they write, and of more, which no cache holds, by what they read.
_SPLIT_FURTHER = range(257, 4097)


def gram(rows: Tensor) -> Tensor:
    r"""Symmetric product :math:`R^\top R` of ``rows (*, m, d)``, ``(*, d, d)``."""
    d = rows.shape[-1]
    return add_gram(rows.new_empty(*rows.shape[:-2], d, d), rows, old=0, new=1)


def add_gram(out: Tensor, rows: Tensor, *, old: float, new: float) -> Tensor:
    r""":math:`S \leftarrow old \cdot S + new \cdot R^\top R`, in place and in one pass.

    Args:
        out: Symmetric matrices S ``(*, d, d)``; what they hold is not read where ``old`` is zero.
        rows: R ``(*, m, d)``.
        old: Factor of what is there.
        new: Factor of the product.

    Returns:
        ``out``.
    """
    return add_symmetric(out, rows, rows, old=old, new=new)


def add_symmetric(out: Tensor, left: Tensor, right: Tensor, *, old: float, new: float) -> Tensor:
    r""":math:`S \leftarrow old \cdot S + new \cdot X^\top Y` for a product that is symmetric, as that of X and A X is.

    Args:
        out: As for :func:`add_gram`.
        left: X ``(*, m, d)``.
        right: Y, of the same shape. Parts of one triangle alone are taken of the product.
        old: Factor of what is there.
        new: Factor of the product.

    Returns:
        ``out``.
    """
    if left.ndim > 3:
        x, y = (rows.flatten(0, -3) for rows in (left, right))
        _add_symmetric(out.view(-1, *out.shape[-2:]), x, y, old, new)
    else:
        _add_symmetric(out, left, right, old, new)
    return out


def _add_symmetric(out: Tensor, x: Tensor, y: Tensor, old: float, new: float) -> None:
    m, d = x.shape[-2:]
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    whole = _WHOLE // 2 if x.ndim == 2 and m in _SPLIT_FURTHER else _WHOLE
    if m <= _WHOLE or d <= whole:
        add(out, x.mT, y, beta=old, alpha=new, out=out)
        return
    h = _half(d)
    side = out[..., :h, h:]
    _add_symmetric(out[..., :h, :h], x[..., :h], y[..., :h], old, new)
    _add_symmetric(out[..., h:, h:], x[..., h:], y[..., h:], old, new)
    add(side, x[..., :h].mT, y[..., h:], beta=old, alpha=new, out=side)
    out[..., h:, :h] = side.mT


def upper_times(upper: Tensor, x: Tensor) -> Tensor:
    """``U X`` for upper triangles U ``(*, n, n)``, whose entries below the diagonal are zero, and X ``(*, n, m)``.

    By bands of rows, each of which begins at its diagonal: n / 96 of them cost (1 + 96 / n) / 2 of the whole, which
    small ones are multiplied as (128 columns: 0.08 ms, and 0.14 by bands).
    """
    n = upper.shape[-1]
    if n <= _NO_BANDS:
        return upper @ x
    out = x.new_empty(x.shape)
    for start in range(0, n, _BAND):
        band = upper[..., start : start + _BAND, start:]
        torch.matmul(band, x[..., start:, :], out=out[..., start : start + _BAND, :])
    return out


def _half(n: int) -> int:
    return (n // 2 + 15) // 16 * 16  # whole vector registers
