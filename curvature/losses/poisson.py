"""Poisson negative log-likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.loss import register_loss


@register_loss(nn.PoissonNLLLoss)
class PoissonNLL(ElementwiseLoss):
    r"""``nn.PoissonNLLLoss`` for counts ``y >= 0``.

    With ``log_input`` (the default) :math:`\ell = e^z - y z` and :math:`\ell'' = e^z`; a sample is
    :math:`e^z - \hat y` with :math:`\hat y \sim \operatorname{Poisson}(e^z)`. Without it
    :math:`\ell = z - y \log(z + \epsilon)` and :math:`\ell'' = y / (z + \epsilon)^2`, which depends on the target and
    is not the Fisher information :math:`1 / (z + \epsilon)`, that of a rate :math:`z + \epsilon`; its samples are then
    normal. ``full`` adds Stirling's term, constant in the output.
    """

    convex = True
    likelihood = True

    @property
    def hessian_is_fisher(self) -> bool:
        """True with ``log_input``: the log-rate is the natural parameter."""
        return bool(self.loss_fn.log_input)

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``exp(z) - y z``, or ``z - y log(z + eps)``."""
        value = z.exp() - y * z if self.loss_fn.log_input else z - y * (z + self.loss_fn.eps).log()
        if self.loss_fn.full:
            stirling = y * y.log() - y + 0.5 * (2 * math.pi * y).log()
            value = value + torch.where(y > 1, stirling, 0.0)
        return value

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``exp(z) - y``, or ``1 - y / (z + eps)``."""
        return z.exp() - y if self.loss_fn.log_input else 1 - y / (z + self.loss_fn.eps)

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``exp(z)``, or ``y / (z + eps)^2``."""
        return z.exp() if self.loss_fn.log_input else y / (z + self.loss_fn.eps) ** 2

    def draw(self, z: Tensor, y: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """``exp(z) - y`` with ``y`` drawn from the model; normal without ``log_input``."""
        if not self.loss_fn.log_input:
            return super().draw(z, y, generator=generator)
        rate = z.exp()
        return rate - torch.poisson(rate.to(generator.device), generator=generator).to(rate)

    def information(self, z: Tensor, *extra: Tensor) -> Tensor:
        """``1 / (z + eps)``."""
        return 1 / (z + self.loss_fn.eps)

    def score(self, z: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """``1 - y / (z + eps)`` with ``y`` drawn from the model."""
        rate = z + self.loss_fn.eps
        return 1 - torch.poisson(rate.to(generator.device), generator=generator).to(rate) / rate

    def check_values(self, output: Tensor, target: Tensor, *extra: Tensor) -> None:
        """Counts, and rates, not negative."""
        if not (target >= 0).all():
            raise ValueError(f"Counts must not be negative, got {target.min().item()}.")
        if not self.loss_fn.log_input and not (output >= 0).all():
            raise ValueError(
                f"With log_input=False the outputs are rates and must not be negative, got {output.min().item()}."
            )
