"""Normal negative log-likelihood with given variances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.loss import register_loss
from solvers.precision import working_dtype


@register_loss(nn.GaussianNLLLoss)
class GaussianNLL(ElementwiseLoss):
    r"""``nn.GaussianNLLLoss`` as a function of the mean: :math:`\ell'' = 1 / \max(\sigma^2, \epsilon)`.

    The variance is the third argument, of the output's shape, with a last axis of size one, or without the last axis.
    It is held fixed. A variance that the model predicts is refused: the loss is not convex in mean and variance
    together, and the curvature in the mean alone would silently leave out the variance head.
    """

    convex = True
    hessian_is_fisher = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``(log var + (z - y)^2 / var) / 2``."""
        (var,) = extra
        value = 0.5 * (var.log() + (z - y) ** 2 / var)
        return value + 0.5 * math.log(2 * math.pi) if self.loss_fn.full else value

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``(z - y) / var``."""
        return (z - y) / extra[0]

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``1 / var``."""
        return 1 / extra[0]

    def prepare(self, output: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """The variance in the output's shape, bounded below by the loss's ``eps``."""
        if len(extra) != 1:
            raise TypeError(
                f"nn.GaussianNLLLoss takes output, target and variance, got {2 + len(extra)} arguments. Pass the "
                "variance as the third."
            )
        dtype = working_dtype(output)
        var = torch.as_tensor(extra[0], dtype=dtype, device=output.device)  # PyTorch takes a float as well
        if var.requires_grad:
            raise ValueError(
                "The variance given to nn.GaussianNLLLoss depends on parameters, but its curvature is known for the "
                "mean only. Pass var.detach() if the variance is to be held fixed, or write the loss on an output "
                "that holds mean and log-variance and wrap it in curvature.losses.AutogradLoss."
            )
        if var.shape == output.shape[:-1] and var.shape != output.shape:
            var = var.unsqueeze(-1)
        elif var.shape != output.shape and var.shape != (*output.shape[:-1], 1) and var.ndim > 0:
            raise ValueError(
                f"The variance must have the output's shape {tuple(output.shape)}, a last axis of size one, or no last "
                f"axis, got {tuple(var.shape)}."
            )
        return (var.clamp(min=self.loss_fn.eps).expand(output.shape),)

    def check_values(self, output: Tensor, target: Tensor, *extra: Tensor) -> None:
        """Variances not negative."""
        for var in extra:
            if not (torch.as_tensor(var) >= 0).all():
                raise ValueError(f"Variances must not be negative, got {torch.as_tensor(var).min().item()}.")
