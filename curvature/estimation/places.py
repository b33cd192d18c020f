"""The terms of a loss on rows of what a model returned, in the places of these rows."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.passes import Pass
from curvature.losses import BatchDim, JoinedTerms, Terms
from curvature.losses.picked import PickedTerms, along, axis_of, by_examples, checked_axis, picked_rows
from curvature.model.graph_nodes import in_order
from curvature.model.trees import tensors_in
from curvature.model.wrappers import passed_on


def in_their_places(terms: Terms, passes: list[Pass], batch_dim: BatchDim) -> Terms:
    """Terms on rows that were picked from the model's output, as terms of all of its rows.

    Raises:
        ValueError: If ``batch_dim`` is given, and the terms are not on rows of one output.
    """
    whole = passes[0].output
    if isinstance(terms, JoinedTerms) and len(passes) == 1:
        if batch_dim is None:
            return terms
        keys = terms.parts
        return terms.change(lambda key, part: _placed(part, whole, key, axis_of(batch_dim, key, keys)))
    if len(passes) > 1 or not isinstance(whole, Tensor):
        if batch_dim is not None:
            raise ValueError(f"batch_dim={batch_dim} names an axis of the output of one pass; the loss sees several.")
        return terms
    z = terms.output
    whole = passed_on(whole, z)
    detached = not whole.requires_grad  # the model calls the loss itself, and returns a copy for the log
    if z is whole or isinstance(batch_dim, Mapping) or (detached and z.shape == whole.shape):
        return along(terms, batch_dim)
    if batch_dim is None and in_order(z, whole):
        return terms

    def pull(sent: Tensor) -> Tensor | None:
        if detached:
            return None
        found: Tensor | None = torch.autograd.grad(z, whole, sent, retain_graph=True, allow_unused=True)[0]
        return found

    picked = picked_rows(pull, terms, whole)
    if picked is None:
        if batch_dim is not None:
            raise ValueError(
                f"batch_dim={batch_dim}: what the loss sees, of shape {tuple(z.shape)}, is no choice of rows of the "
                f"model's output, of shape {tuple(whole.shape)}. Leave batch_dim out and return outputs with the "
                "examples first."
            )
        return terms
    rows, axes = picked
    terms = PickedTerms(terms, rows, (prod(axes[:1]), prod(axes[1:])), whole)
    if batch_dim is None:
        return terms
    axis = min(checked_axis(batch_dim, whole.dim()), len(axes) - 1)  # behind the class axis, if that was taken away
    return by_examples(terms, axes, axis, whole)


def _placed(terms: Terms, whole: Any, key: Any, batch_dim: int | None) -> Terms:
    """The terms of one loss of a sum by the examples along an axis of what the model returned.

    Raises:
        ValueError: If the loss sees something else.
    """
    if batch_dim is None or any(terms.output is z for z in tensors_in(whole)):
        return along(terms, batch_dim)
    raise ValueError(
        f"batch_dim={batch_dim}: what the loss {key!r} sees, of shape {tuple(terms.output.shape)}, is not what the "
        "model returned. Hand the losses of a sum the outputs themselves, or return outputs with the examples first."
    )
