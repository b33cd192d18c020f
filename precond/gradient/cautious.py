"""Cautious updates: no entry moves against its gradient."""

from __future__ import annotations

from torch import Tensor


def cautious(directions: list[Tensor], gradients: list[Tensor], *, stacked: bool = False) -> list[Tensor]:
    r"""Directions without the entries that oppose the gradient at hand, the others lengthened in return.

    .. math:: m_i = [d_i g_i \ge 0], \qquad d'_i = \frac{d_i m_i}{\operatorname{mean}(m)}

    A momentum that has overshot pulls uphill in some entries; those wait. An entry without a gradient goes on: the rows
    of an embedding that the batch does not use.

    Args:
        directions: d, each with a g of its shape.
        gradients: g.
        stacked: Whether leading axes count matrices, each with a mean of its own.

    Returns:
        Zero where all entries oppose.

    References:
        Liang et al. (2024), algorithm 1, there without the entries of no gradient, https://arxiv.org/abs/2411.16085
    """
    agree = [(d * g >= 0).to(d.dtype) for d, g in zip(directions, gradients, strict=True)]
    shares = [m.mean((-2, -1), keepdim=True) if stacked and m.ndim > 2 else m.mean() for m in agree]
    # Where no entry is left, 0 / 1.
    return [d * m / s.masked_fill(s == 0, 1) for d, m, s in zip(directions, agree, shares, strict=True)]
