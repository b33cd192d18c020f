"""The loss of a pass that nobody saw, read off the gradient at the model's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvature.estimation.passes import Pass
from curvature.estimation.step import Step, Weight
from curvature.estimation.weights_of_unseen_losses import Untold, enter, not_told, weight_by_graph, weight_of_form
from curvature.losses import Loss, Terms, loss_for
from curvature.losses.from_gradient import from_output_gradient, gradient_terms


@dataclass(frozen=True)
class OutputGradient:
    """What the gradient at the output of a pass tells of the loss.

    Args:
        loss: The optimizer's; ``None`` where it is unknown.
        module: The module that was given.
        told: The scale of a loss of unknown type must be told by calls of its module.
        class_dim: Class axis of the output, where it cannot be read off.
        empirical: Whether the curvature is.
        plain: A squared error of a weight that nothing tells is taken for a plain mean.
    """

    loss: Loss | None
    module: nn.Module | None
    told: bool
    class_dim: int | None
    empirical: bool
    plain: bool

    def read(self, step: Step, origin: Pass, z: Tensor, gradient: Tensor) -> tuple[Terms, Weight] | None:
        """The loss on an output, and how it enters; ``None`` for a penalty.

        Args:
            step: Keeps the account of the losses.
            origin: The pass at whose output the gradient arrived.
            z: That output, or that of the pass run again.
            gradient: What arrived.

        Raises:
            TypeError: If the gradient does not tell.
        """
        form = origin.form
        if form is not None and not bool(gradient.any()):
            return None  # no signal
        rounding = 8 * torch.finfo(gradient.dtype).eps
        if origin.size is not None and bool(gradient.abs().max() <= rounding * origin.size):  # a difference of equals
            origin.left_out = gradient.dtype.itemsize < 4 and not (origin.penalty and origin.silent)
            return None
        loss = self.loss if form is None else loss_for(form())
        if loss is None and self.told:
            raise TypeError(
                "an empirical Fisher from the gradient at the model's output has the scale of whatever backward() is "
                "called on, which a loss of unknown type does not tell. Give the optimizer the loss module that the "
                "loop calls (of a function: curvature.losses.AutogradLoss(loss_fn, reduction='mean')), or set "
                "capture='gradient' for a mean loss that is neither accumulated nor scaled."
            )
        try:
            terms: Terms
            if loss is None:
                terms, weights = gradient_terms(z, gradient), None
            else:
                class_dim = self.class_dim if form is None else None
                known = self.empirical, origin.seen, origin.size
                terms, weights = from_output_gradient(loss, z, gradient, class_dim, *known)
        except (TypeError, ValueError):
            if origin.penalty:
                origin.left_out = not origin.silent and bool(gradient.any())
                return None
            if form is not None or (origin.labelled and _hidden(gradient)):
                origin.left_out = True
                return None
            raise
        whole = all(_of_rows(terms.rows(part)) for part in origin.parts)
        asked = origin.picked or origin.filled
        if loss is not None and isinstance(loss.loss_fn, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)):
            asked |= weights is not None or not origin.penalty  # residuals of other losses may be zero
        if whole and asked and loss is not None:
            whole = _of_rows(_with_signal(loss.loss_fn, terms, z, gradient))
        if not whole:
            raise not_told()
        if origin.penalty and (weights is None or not _is_certain(terms, weights)):
            origin.left_out = not origin.silent and bool(gradient.any())
            return None
        if weights is None:
            try:
                if form is not None:
                    return terms, weight_of_form(step, self.module, origin, terms, gradient)
                return terms, weight_by_graph(step, self.module, origin, terms, gradient, self.plain)
            except (TypeError, Untold):
                if form is nn.MSELoss and isinstance(self.module, form):
                    raise not_told() from None
                if form is None and not (origin.labelled and _hidden(gradient)):
                    raise
                origin.left_out = True
                return None
        if form is not None:
            enter(step, self.module, weights[terms.mask].sum())
        elif origin.beside and step.sums:
            step.add_sum(min(step.sums), weights[terms.mask].sum())
        else:
            step.absolute = True
        if loss is not None and loss.zero_when_perfect:
            origin.told = _value(loss.loss_fn, terms, weights, gradient)
        counted = weights[terms.mask]
        step.values.append((counted.sum() if origin.told is None else origin.told).to(terms.total))
        if counted.numel() and bool(counted.max() - counted.min() <= torch.finfo(z.dtype).eps ** 0.5 * counted.max()):
            share = counted.mean()
            if form is None:
                step.seen.append(torch.stack([share, terms.total.to(counted)]))
            return terms, Weight(share)
        n, r, c = terms.shape
        return terms, Weight(None, terms.unrows(weights.reshape(n, r, 1).expand(n, r, c)))


def _value(loss: nn.Module, terms: Terms, weights: Tensor, gradient: Tensor) -> Tensor:
    r"""The value of a loss whose terms have these weights, and whose gradient arrived.

    That of :math:`w (A(z) - t \cdot z)` differs from one with targets s by :math:`(G - w (\nabla A - s)) \cdot z`, if
    :math:`G = w (\nabla A - t)` arrived: a cross-entropy may have several labels, as in mixup.
    """
    value = (weights * torch.where(terms.mask, terms.values().detach(), 0)).sum()
    if not isinstance(loss, nn.CrossEntropyLoss) or loss.weight is not None:
        return value
    own = weights.reshape(terms.shape[:2]).unsqueeze(-1) * terms.rows(terms.gradient().detach())
    other = terms.rows(gradient).to(own) - own
    return value + (other * terms.rows(terms.output.detach())).sum()


def _is_certain(terms: Terms, weights: Tensor) -> bool:
    """Whether no penalty has a gradient like this: with one number or two in a term, any has, if terms have weights."""
    counted = weights[terms.mask]
    if terms.shape[-1] > 2 or not counted.numel():
        return True
    return bool(counted.max() - counted.min() <= torch.finfo(counted.dtype).eps ** 0.5 * counted.max())


def _of_rows(part: Tensor) -> bool:
    """Whether all entries of a term are seen, or none."""
    return bool((part == part[..., :1]).all())


def _with_signal(loss: nn.Module, terms: Terms, z: Tensor, gradient: Tensor) -> Tensor:
    """The entries of the terms that a loss gives a gradient, or would not bend along."""
    rows = terms.rows(z.detach())
    flat = torch.zeros_like(rows, dtype=torch.bool)
    if isinstance(loss, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)):
        p = rows.softmax(-1) if isinstance(loss, nn.CrossEntropyLoss) else rows.sigmoid()
        flat = p * (1 - p) <= torch.finfo(p.dtype).eps ** 0.5
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is not None:
        flat |= terms.rows((loss.weight == 0).to(z.device).expand(z.shape))
    mask = terms.mask.reshape(rows.shape[:-1]).unsqueeze(-1)
    return (terms.rows(gradient) != 0) | flat | ~mask


def _hidden(gradient: Tensor) -> bool:
    """Whether differences of probabilities are so small that rounding may hide what they are multiples of."""
    return bool(gradient.abs().max() * gradient.shape[0] < torch.finfo(gradient.dtype).eps ** 0.25)
