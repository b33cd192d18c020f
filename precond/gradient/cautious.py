"""Cautious updates: no entry moves against its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def cautious(directions: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    r"""Directions without the entries that oppose the gradient at hand, the others lengthened in return.

    .. math:: m_i = [d_i g_i \ge 0], \qquad d'_i = \frac{d_i m_i}{\operatorname{mean}(m)}

    A momentum that has overshot pulls uphill in some entries; those wait. An entry without a gradient goes on: the rows
    of an embedding that the batch does not use.

    Args:
        directions: d, each with a g of its shape.
        gradients: g.

    Returns:
        Zero where all entries oppose.

    References:
        Liang et al. (2024), algorithm 1, there without the entries of no gradient, https://arxiv.org/abs/2411.16085
    """
    agree = [(d * g >= 0).to(d.dtype) for d, g in zip(directions, gradients, strict=True)]
    shares = [m.mean().clamp(min=1 / max(m.numel(), 1)) for m in agree]
    out = torch._foreach_mul(directions, agree)
    torch._foreach_div_(out, shares)
    return list(out)
