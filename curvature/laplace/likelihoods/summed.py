"""The likelihoods of a Laplace posterior."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from curvature.losses import Loss, WeightedSum, loss_for

#: A name of laplace-torch, or a loss that is a negative log-likelihood.
Likelihood = Literal["regression", "classification"] | nn.Module | Loss
_NAMED = {"regression": nn.MSELoss, "classification": nn.CrossEntropyLoss}


def summed(likelihood: Likelihood) -> Loss:
    """The likelihood as a loss that sums its terms."""
    if isinstance(likelihood, str):
        if likelihood not in _NAMED:
            raise ValueError(f"likelihood is {' or '.join(map(repr, _NAMED))} or a loss, not {likelihood!r}.")
        return loss_for(_NAMED[likelihood](reduction="sum"))
    loss = loss_for(likelihood)
    if isinstance(loss, WeightedSum):
        raise ValueError("a sum of losses is no likelihood of one output. Take the losses one by one, with output=.")
    if loss.reduction == "sum":
        return loss
    loss = copy.copy(loss)
    if isinstance(getattr(loss.loss_fn, "reduction", None), str):
        loss.loss_fn = copy.copy(loss.loss_fn)
        loss.loss_fn.reduction = "sum"
    if loss.reduction != "sum":
        raise ValueError(f"{loss!r} has the reduction {loss.reduction!r} for good; give one that sums its terms.")
    return loss
