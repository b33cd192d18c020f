"""The weight of a loss whose gradient does not tell it, from the number that it led to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.losses import Terms


@dataclass(frozen=True)
class Rest:
    """What a backward pass was called on, times what it began with, less what other losses have told of it.

    Attributes:
        value: That number.
        size: The sum of the sizes of those that it is a difference of.
    """

    value: Tensor
    size: Tensor

    def less(self, other: Tensor) -> Rest:
        """What is left without another part of it."""
        other = other.detach().to(self.value)
        return Rest(self.value - other, self.size + other.abs())


def factor_of_divergence(terms: Terms, gradient: Tensor, rest: Rest) -> Tensor | None:
    r"""What each term is multiplied by in a number that is a multiple of divergences from labels and nothing else.

    The gradient :math:`G_n = w (p_n - t_n)` tells the labels of every weight, and these the number
    :math:`R(w) = w \sum_n \mathrm{KL}(p_n - G_n / w \,\|\, p_n)`, which falls as w rises: w is found by bisection.

    Args:
        terms: Of a cross-entropy, with any targets.
        gradient: G.
        rest: R.

    Returns:
        w, 0-d; ``None`` where rounding hides it.
    """
    sign = rest.value.double().sign()
    logs = terms.rows(terms.output.detach()).double().log_softmax(-1)
    p, g, value = logs.exp(), sign * terms.rows(gradient).double(), rest.value.double().abs()
    least = (g / p).amax()
    if not bool(least > 0) or not bool(value > 0):
        return None

    def number(w: Tensor) -> Tensor:
        t = (p - g / w).clamp(min=0)
        return w * (torch.special.xlogy(t, t) - t * logs).sum()

    low, high = least.log(), least.log() + 46.0  # beyond that nothing is left of R
    for _ in range(64):
        middle = (low + high) / 2
        larger = number(middle.exp()) > value
        low, high = torch.where(larger, middle, low), torch.where(larger, high, middle)
    w = low.exp()
    eps = max(torch.finfo(rest.value.dtype).eps, torch.finfo(gradient.dtype).eps)
    slope = (number(1.01 * w) - number(w)).abs() / 0.01  # of R in the logarithm of w
    noise = eps * (rest.size.double() + g.abs().sum()) + torch.finfo(p.dtype).eps * w * len(p)
    told = ((number(w) - value).abs() <= eps**0.5 * slope) & (16 * noise <= 4 * eps**0.5 * slope)
    return (sign * w).to(terms.total) if bool(told) else None


def factor_of_squares(gradient: Tensor, rest: Rest) -> Tensor | None:
    """The weight w of every square in ``R = w sum (z - y)^2`` from R and its gradient ``2 w (z - y)``.

    Rounding of the gradient is relative to it; that of the sum, of which R may be a small part, is of some units in its
    last place: where w might be off by more than a per cent, it is ``None``.
    """
    eps = torch.finfo(rest.value.dtype).eps
    if not bool(16 * eps * rest.size.double() <= max(4 * eps**0.5, 1 / 16) * rest.value.double().abs()):
        return None
    return gradient.double().square().sum() / (4 * rest.value.double())


def factor_by_value(terms: Terms, gradient: Tensor, rest: Rest) -> Tensor | None:
    r"""What each term is multiplied by in a number that is a multiple of a loss in natural parameters and nothing else.

    A term is :math:`A(z) - t \cdot z`. From the number :math:`R = w \sum_n (A(z_n) - t_n \cdot z_n)` and its gradient
    :math:`G_n = w (\nabla A(z_n) - t_n)` the targets t drop out of
    :math:`R - \sum_n G_n \cdot z_n = w \sum_n (A(z_n) - z_n \cdot \nabla A(z_n))`.

    Args:
        terms: With any targets.
        gradient: G.
        rest: R.

    Returns:
        w, 0-d; ``None`` where rounding hides it.
    """
    z = terms.output.detach().double()
    own = torch.where(terms.mask, terms.values().detach().double(), 0).sum()
    slope, arrived = (terms.gradient().detach().double() * z), gradient.double() * z
    left, unit = rest.value.double() - arrived.sum(), own - slope.sum()
    eps = max(torch.finfo(rest.value.dtype).eps, torch.finfo(gradient.dtype).eps)
    size = rest.size.double() + arrived.abs().sum()
    if not bool((unit != 0) & (16 * eps * size <= 4 * eps**0.5 * left.abs())):
        return None
    if not bool(16 * eps * (own.abs() + slope.abs().sum()) <= 4 * eps**0.5 * unit.abs()):
        return None
    return (left / unit).to(terms.total)
