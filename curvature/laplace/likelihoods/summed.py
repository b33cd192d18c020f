"""A likelihood as a loss: summed, and with targets that a likelihood can have."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.losses import CrossEntropy, Loss, Terms, WeightedSum, loss_over_data
from curvature.losses.loss import check_loss

#: A name of laplace-torch, or a loss that is a negative log-likelihood.
Likelihood = Literal["regression", "classification"] | nn.Module | Loss
_NAMED = {"regression": nn.MSELoss, "classification": nn.CrossEntropyLoss}


class Categorical(CrossEntropy):
    """Cross-entropy as the negative log-likelihood of one class: class probabilities as targets add up to one."""

    def terms(
        self,
        output: Tensor,
        target: Tensor,
        *extra: Tensor,
        class_dim: int | None = None,
        mask: Tensor | None = None,
        as_called: bool = False,
        check: bool = False,
    ) -> Terms:
        """See :meth:`curvature.losses.Loss.terms`.

        Raises:
            ValueError: With ``check``, if the class probabilities of a term do not add up to one.
        """
        terms = super().terms(output, target, *extra, class_dim=class_dim, mask=mask, as_called=as_called, check=check)
        if check and target.is_floating_point():
            sums = terms.layout.rows(target.double()).sum(-1)
            sums = sums.reshape(-1) if mask is None else sums[terms.mask]  # no term has sums of zero either
            rounding = 8 * torch.finfo(target.dtype).eps * terms.columns
            if not bool(((sums - 1).abs() <= rounding).all()):
                raise ValueError(
                    f"the class probabilities {tuple(target.shape)} of an example add up to between {sums.min():.4g} "
                    f"and {sums.max():.4g}, and a categorical likelihood has one class per example: they add up to 1. "
                    "Several labels at once, each yes or no, are nn.BCEWithLogitsLoss(), which "
                    "curvature.laplace.LinearizedLaplace takes as likelihood."
                )
        return terms


def likelihood_for(likelihood: Likelihood) -> Loss:
    """The loss that is the negative logarithm of a likelihood.

    Raises:
        ValueError: If the name is unknown, or the likelihood is a sum of losses.
    """
    if isinstance(likelihood, str):
        if likelihood not in _NAMED:
            raise ValueError(f"likelihood is {' or '.join(map(repr, _NAMED))} or a loss, not {likelihood!r}.")
        return likelihood_for(_NAMED[likelihood](reduction="sum"))
    loss = loss_over_data(likelihood)
    if isinstance(loss, WeightedSum):
        raise ValueError("a sum of losses is no likelihood of one output. Take the losses one by one, with output=.")
    return Categorical(loss.loss_fn) if type(loss) is CrossEntropy else loss


def check_likelihood(name: str, value: Any) -> Any:
    """The name of a likelihood, or a loss; which of them are one, :func:`summed` says."""
    return value if isinstance(value, str) else check_loss(name, value)


def summed(likelihood: Likelihood) -> Loss:
    """The likelihood as a loss that sums its terms."""
    return likelihood_for(likelihood).summed()
