"""Squared error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.loss import register_loss


@register_loss(nn.MSELoss)
class SquaredError(ElementwiseLoss):
    r"""``nn.MSELoss``: :math:`\ell = (z - y)^2`, :math:`H_t = 2 I`.

    PyTorch averages over entries, so the mean loss over ``N`` examples with ``C`` outputs has the Hessian
    :math:`2 I / (N C)`. ``H_t`` is the Fisher information of the normal likelihood :math:`\propto e^{-\ell}`, whose
    variance is 1/2; for unit variance it would be ``I``.
    """

    zero_when_perfect = True
    convex = True
    hessian_is_fisher = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``(z - y)^2``."""
        return (z - y) ** 2

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``2 (z - y)``."""
        return 2 * (z - y)

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``2``."""
        return torch.full_like(z, 2)
