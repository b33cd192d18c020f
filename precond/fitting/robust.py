r"""Robust losses :math:`\rho(z)` of squared residuals, as in ``scipy.optimize.least_squares``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["linear", "soft_l1", "huber", "cauchy", "arctan"]
#: ``z`` to ``rho``, its first and its second derivative.
Rho = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _linear(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z, torch.ones_like(z), torch.zeros_like(z)


def _soft_l1(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = 1 + z
    return 2 * (t.sqrt() - 1), t**-0.5, -0.5 * t**-1.5


def _huber(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside, safe = z <= 1, z.clamp(min=1)
    return (
        torch.where(inside, z, 2 * safe.sqrt() - 1),
        torch.where(inside, 1.0, safe**-0.5),
        torch.where(inside, 0.0, -0.5 * safe**-1.5),
    )


def _cauchy(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = 1 + z
    return torch.log1p(z), 1 / t, -1 / t**2


def _arctan(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = 1 + z**2
    return torch.atan(z), 1 / t, -2 * z / t**2


LOSSES: dict[str, Rho] = {
    "linear": _linear,
    "soft_l1": _soft_l1,
    "huber": _huber,
    "cauchy": _cauchy,
    "arctan": _arctan,
}


_FLOOR = 1e-4


def cost(residuals: Tensor, rho: Rho, scale: float) -> Tensor:
    r""":math:`\tfrac12 s^2 \sum \rho((r / s)^2)` over the last axis."""
    return 0.5 * scale**2 * rho((residuals / scale).square())[0].sum(-1)


def reweighted(residuals: Tensor, jacobian: Tensor, rho: Rho, scale: float) -> tuple[Tensor, Tensor]:
    """Residuals and Jacobian whose Gauss-Newton model is that of the robust cost (Triggs et al. 2000, section 4.3)."""
    if rho is _linear:
        return residuals, jacobian
    z = (residuals / scale).square()
    _, first, second = rho(z)
    # Far outliers bend the cost downwards; a floor keeps the model convex, and small enough not to lose digits in it.
    root = torch.maximum(first + 2 * second * z, _FLOOR * first).sqrt()
    return residuals * first / root, jacobian * root.unsqueeze(-1)
