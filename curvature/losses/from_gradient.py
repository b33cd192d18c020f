"""What the gradient that arrives at a model's output tells about the loss behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvature.losses import AmbiguousClassAxisError, Layout, Loss, Terms
from curvature.losses.elementwise import entry_layout
from solvers.precision import working_dtype


class GradientTerms(Terms):
    """The terms of a loss known by its gradient alone: enough for an empirical Fisher, for nothing else."""

    def __init__(
        self, output: Tensor, layout: Layout, mask: Tensor, total: Tensor, gradient: Tensor, reduction: str
    ) -> None:
        super().__init__(output, layout, mask, total, reduction)
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
    loss: Loss,
    output: Tensor,
    gradient: Tensor,
    class_dim: int | None,
    empirical: bool = False,
    arrived_at: Tensor | None = None,
    size: Tensor | None = None,
) -> tuple[Terms, Tensor | None]:
    """The terms of a loss from ``dL/dz``, and their weights in L.

    Rows that are exactly zero are masked. For cross-entropy the class axis is the one along which the gradient sums to
    zero, and the label is where it is smallest. Labels are only relied on where class weights or an empirical Fisher
    need them, and only if they explain the gradient up to one factor (the scale of the loss, which nobody knows here).

    Args:
        loss: Interpretation of the loss.
        output: The model's output z.
        gradient: ``dL/dz``.
        class_dim: Class axis, where the user said.
        empirical: The gradients of the terms are needed, not only their curvature.
        arrived_at: The output at which the gradient arrived, if ``output`` is a repetition of it with other dropout.
        size: Largest entry of what the gradient is a difference of, where it is one: its rounding errors are of this.

    Returns:
        The terms, and what each of them is multiplied by in L, ``(N, R)``; ``None`` where only their mean can be meant.

    Raises:
        AmbiguousClassAxisError: If not exactly one axis of a cross-entropy's gradient sums to zero.
        TypeError: If the targets are needed but cannot be read off.
    """
    options = loss.loss_fn
    if isinstance(options, nn.CrossEntropyLoss):
        class_dim = _class_axis(gradient, class_dim, size)
        rows = gradient.movedim(class_dim, -1)
        least = 0 if size is None else 16 * torch.finfo(gradient.dtype).eps * size
        target, mask = rows.argmin(-1), (rows.abs() > least).any(-1)
        labelled = empirical or options.weight is not None
    else:
        # A binary label is one where the loss pulls its logit up; the curvature of the others below ignores targets.
        if isinstance(options, nn.NLLLoss):
            raise _needs_targets(options)
        binary = isinstance(options, nn.BCEWithLogitsLoss)
        target = (gradient < 0).to(output.dtype) if binary else output.detach()
        terms = loss.terms(output, target, class_dim=class_dim)
        if not terms.fisher(strict=False).hessian_is_fisher:
            raise _needs_targets(options)
        mask = (terms.rows(gradient) != 0).any(-1).reshape(terms.layout.term_shape)
        labelled = empirical or (binary and options.pos_weight is not None)
    seen = loss.terms(output if arrived_at is None else arrived_at, target, class_dim=class_dim, mask=mask)
    if labelled and not _proportional(seen.gradient(), gradient, size):
        raise _needs_targets(options)
    weights = _weights(seen, gradient, size)
    if weights is None and isinstance(options, nn.CrossEntropyLoss) and options.weight is None:
        weights = _weights_of_mixed_labels(seen, gradient, size)
    return loss.terms(output, target, class_dim=class_dim, mask=mask), weights


def gradient_terms(
    output: Tensor, gradient: Tensor, scale: Tensor | None = None, reduction: str = "mean"
) -> GradientTerms:
    """The terms of a loss of which only ``dL/dz`` is known.

    Args:
        output: The model's output z.
        gradient: ``dL/dz``.
        scale: Derivative of what is differentiated by the loss (GradScaler, accumulation), if known.
        reduction: Of the loss.
    """
    layout = entry_layout(output, None)
    mask = (layout.rows(gradient) != 0).any(-1)
    total = mask.sum().to(working_dtype(gradient))
    unscaled = gradient.detach() if scale is None else gradient.detach() / scale
    return GradientTerms(output, layout, mask, total, unscaled * total if reduction == "mean" else unscaled, reduction)


def _weights(terms: Terms, gradient: Tensor, size: Tensor | None) -> Tensor | None:
    """What each term is multiplied by, if the gradients of the terms, so multiplied, are the one that arrived."""
    own, arrived = (terms.rows(g).to(working_dtype(gradient)) for g in (terms.gradient(), gradient))
    lengths = torch.linalg.vector_norm(own, dim=-1)
    weights = (own * arrived).sum(-1) / lengths.square().clamp(min=torch.finfo(own.dtype).tiny)
    slack = torch.finfo(gradient.dtype).eps ** 0.5
    off = torch.linalg.vector_norm(own * weights.unsqueeze(-1) - arrived, dim=-1)
    noise = 0 if size is None else 4 * torch.finfo(gradient.dtype).eps * own.shape[-1] ** 0.5 * size.to(own)
    explained = (off <= slack * torch.linalg.vector_norm(arrived, dim=-1) + noise).all()
    positive = (weights * lengths >= -noise).all()
    return weights.clamp(min=0) if bool(explained) and bool(positive) else None


def _weights_of_mixed_labels(terms: Terms, gradient: Tensor, size: Tensor | None) -> Tensor | None:
    r"""What each term of a cross-entropy with several labels is multiplied by, of mixup, say.

    In :math:`w\,(p - t)` with targets :math:`t \ge 0` the weight is the largest ratio to p if some class has no target.
    That is so where two classes of a row have this ratio; and, if some row has no two, where it is the same in half of
    the rows or more.
    """
    eps = torch.finfo(gradient.dtype).eps
    slack = eps**0.5 if eps < 1e-6 else 4 * eps
    if size is not None and bool(16 * eps * size > slack * gradient.abs().max()):
        return None  # ratios are those of rounding errors
    p, arrived = terms.rows(terms.output).detach().softmax(-1), terms.rows(gradient)
    counts = terms.mask.reshape(arrived.shape[:-1])
    weights = torch.where(p > eps, arrived / p, 0).amax(-1)
    twice = ((arrived - weights.unsqueeze(-1) * p).abs() <= slack * weights.unsqueeze(-1) * p).sum(-1) > 1
    found = weights[counts]
    if not len(found) or not bool(found.max() > 0):
        return None
    if bool((twice[counts] & (found > 0)).all()):
        return torch.where(counts, weights, 0)
    alike = found >= (1 - slack) * found.max()
    return torch.where(counts, found[alike].median(), 0) if bool(alike.sum() >= max(2, len(found) / 2)) else None


def _needs_targets(loss_fn: nn.Module) -> TypeError:
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return TypeError(
        f"what is estimated for {name} depends on targets (class weights, soft labels, an empirical "
        "Fisher), which the gradient at the model's output does not show. Call the loss module that was given to the "
        "optimizer in the loop itself, or estimate an exact or mc Fisher without class weights."
    )


def _proportional(expected: Tensor, gradient: Tensor, size: Tensor | None) -> bool:
    """Whether two gradients point the same way."""
    slack = torch.finfo(gradient.dtype).eps ** 0.5
    expected, gradient = expected.double().flatten(), gradient.double().flatten()
    if size is not None:  # what is lost in a difference
        slack += 16 * slack**2 * float(size) * gradient.numel() ** 0.5 / max(float(gradient.norm()), 1e-300)
    if not gradient.any():
        return True  # everything is masked
    return bool(expected.any()) and bool(expected @ gradient >= (1 - slack) * expected.norm() * gradient.norm())


def _class_axis(gradient: Tensor, class_dim: int | None, size: Tensor | None) -> int:
    """The axis along which a softmax's gradient sums to zero."""
    rank = gradient.dim()
    candidates = {class_dim % rank} if class_dim is not None else {1, rank - 1} if rank > 1 else {0}
    values = gradient.to(working_dtype(gradient))
    found = []
    for axis in sorted(candidates):
        # Rounding: a sum of n numbers of low precision.
        largest = values.abs().sum(axis).max() if size is None else size.to(values) * values.shape[axis]
        slack = 16 * torch.finfo(gradient.dtype).eps * largest
        if bool((values.sum(axis).abs() <= slack).all()):
            found.append(axis)
    if len(found) != 1:
        axes = " and ".join(str(axis) for axis in sorted(candidates))
        raise AmbiguousClassAxisError(
            f"the class axis of an output of shape {tuple(gradient.shape)} cannot be read off its gradient: "
            f"{len(found)} of the axes {axes} sum to zero, as the gradient of a cross-entropy does along its classes. "
            "Pass class_dim= if both do. If none does, the loss is more than a cross-entropy of this output: call the "
            "loss module that was given to the optimizer in the loop itself; or, where a penalty sends this gradient, "
            "let only calls of that module count: loop=Loop(capture='loss')."
        )
    return found[0]
