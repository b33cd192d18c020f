"""Losses that are quadratic near zero and linear far away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.errors import EMPIRICAL, NoCurvatureError
from curvature.losses.loss import register_loss


@register_loss(nn.HuberLoss)
class Huber(ElementwiseLoss):
    r"""``nn.HuberLoss``: quadratic up to the threshold :math:`\delta`, linear beyond.

    With :math:`r = z - y`, :math:`\ell = r^2 / 2` for :math:`|r| \le \delta`, else :math:`\delta (|r| - \delta / 2)`.
    The curvature is 1 inside and 0 outside, where the loss is linear; at :math:`|r| = \delta`, where it is not
    defined, 1. Outliers thus have no weight in the Gauss-Newton matrix. Samples are normal: no likelihood has this
    Hessian as its Fisher information.
    """

    zero_when_perfect = True
    convex = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``r^2 / 2`` or ``delta (|r| - delta / 2)``."""
        delta, r = self.loss_fn.delta, (z - y).abs()
        return torch.where(r <= delta, 0.5 * r**2, delta * (r - 0.5 * delta))

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``r`` clipped to ``[-delta, delta]``."""
        return (z - y).clamp(-self.loss_fn.delta, self.loss_fn.delta)

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """One inside, zero outside."""
        return ((z - y).abs() <= self.loss_fn.delta).to(z)


@register_loss(nn.SmoothL1Loss)
class SmoothL1(ElementwiseLoss):
    r"""``nn.SmoothL1Loss``: the Huber loss divided by its threshold :math:`\beta`, curvature :math:`1 / \beta` inside.

    With ``beta=0`` it is the L1 loss, which has no curvature.
    """

    zero_when_perfect = True
    convex = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``r^2 / (2 beta)`` or ``|r| - beta / 2``."""
        beta, r = self.loss_fn.beta, (z - y).abs()
        return torch.where(r < beta, 0.5 * r**2 / beta, r - 0.5 * beta) if beta > 0 else r

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``r / beta`` clipped to ``[-1, 1]``."""
        beta = self.loss_fn.beta
        return ((z - y) / beta).clamp(-1, 1) if beta > 0 else (z - y).sign()

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``1 / beta`` inside, zero outside."""
        beta = self.loss_fn.beta
        if beta == 0:
            raise NoCurvatureError(
                "nn.SmoothL1Loss(beta=0) is linear in the output: it has no curvature. Use a positive beta, or "
                f"{EMPIRICAL}."
            )
        return ((z - y).abs() < beta).to(z) / beta
