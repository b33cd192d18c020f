"""What the gradient that arrives at a model's output tells about the loss behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvature.losses import AmbiguousClassAxisError, Layout, Loss, Terms


class GradientTerms(Terms):
    """The terms of a loss known by its gradient alone: enough for an empirical Fisher, for nothing else."""

    def __init__(self, output: Tensor, layout: Layout, mask: Tensor, total: Tensor, gradient: Tensor) -> None:
        super().__init__(output, layout, mask, total, "mean")
        self._gradient = gradient

    def gradient(self) -> Tensor:
        return self._gradient

    def values(self) -> Tensor:
        raise self._unknown("values")

    def hessian_product(self, v: Tensor) -> Tensor:
        raise self._unknown("the Hessian")

    def sqrt_column(self, c: int) -> Tensor:
        raise self._unknown("the Hessian")

    def sample(self, generator: torch.Generator) -> Tensor:
        raise self._unknown("samples")

    def _unknown(self, what: str) -> TypeError:
        return TypeError(f"{what} of this loss cannot be read off its gradient; register the loss or use 'empirical'.")


def from_output_gradient(
    loss: Loss | None,
    output: Tensor,
    gradient: Tensor,
    scale: Tensor | None,
    reduction: str,
    class_dim: int | None,
) -> Terms:
    """The terms of a loss from ``dL/dz``.

    Rows that are exactly zero are masked. For cross-entropy the class axis is the one along which the gradient sums to
    zero, and the label is where it is smallest.

    Args:
        loss: Interpretation of the loss, or ``None`` where only its gradient is known.
        output: The model's output z.
        gradient: ``dL/dz``.
        scale: Derivative of what is differentiated by the loss (GradScaler, accumulation), if known.
        reduction: Of the loss.
        class_dim: Class axis, where the user said.

    Raises:
        AmbiguousClassAxisError: If more than one axis of a cross-entropy's gradient sums to zero.
    """
    z = output.detach()
    if loss is not None and isinstance(loss.loss_fn, nn.CrossEntropyLoss):
        axis = _class_axis(gradient) if class_dim is None else class_dim % z.dim()
        rows = gradient.movedim(axis, -1)
        valid = (rows != 0).any(-1)
        target = rows.argmin(-1)
        return loss.terms(output, target, class_dim=axis, mask=valid)
    if loss is not None:
        # A binary label is one where the loss pulls its logit up; the curvature of the others below ignores targets.
        target = (gradient < 0).to(z.dtype) if isinstance(loss.loss_fn, nn.BCEWithLogitsLoss) else z
        terms = loss.terms(output, target, class_dim=class_dim)
        if not terms.hessian_is_fisher:
            raise TypeError(
                f"the curvature of {type(loss.loss_fn).__name__} depends on targets that the model's output gradient "
                "does not show. Call the loss module itself in the loop, or use fisher='empirical'."
            )
        valid = (terms.rows(gradient) != 0).any(-1)
        return loss.terms(output, target, class_dim=class_dim, mask=valid.reshape(terms.layout.term_shape))
    layout = Layout(output.shape, () if output.dim() < 2 else (output.dim() - 1,))
    mask = (layout.rows(gradient) != 0).any(-1)
    total = mask.sum().to(torch.promote_types(gradient.dtype, torch.float32))
    unscaled = gradient.detach() if scale is None else gradient.detach() / scale
    return GradientTerms(output, layout, mask, total, unscaled * total if reduction == "mean" else unscaled)


def _class_axis(gradient: Tensor) -> int:
    """The axis along which a softmax's gradient sums to zero."""
    if gradient.dim() <= 2:
        return gradient.dim() - 1
    size = gradient.abs().float()
    found = []
    for axis in (1, gradient.dim() - 1):
        # Rounding: a sum of n numbers of low precision.
        slack = 16 * torch.finfo(gradient.dtype).eps * size.sum(axis).max()
        if bool((gradient.float().sum(axis).abs() <= slack).all()):
            found.append(axis)
    if len(found) != 1:
        raise AmbiguousClassAxisError(
            f"the class axis of an output of shape {tuple(gradient.shape)} cannot be read off its gradient: "
            f"{len(found)} of the axes 1 and {gradient.dim() - 1} sum to zero. Pass class_dim=."
        )
    return found[0]
