"""The diagonal of the Gauss-Newton matrix; takes the place of ``posteriors.laplace.diag_ggn``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvature.laplace.posteriors import functional as F


def build(
    forward: F.Forward, outer_log_likelihood: F.OuterLogLikelihood, init_prec_diag: F.Params | float = 0.0
) -> F.Transform:
    """``init`` and ``update`` of a diagonal approximation.

    Costs one backward pass per output for a batch, and the memory of one; Jacobians of single examples are not formed.

    Args:
        forward: ``forward(params, batch)`` gives the output, one row for each example, and auxiliary information.
        outer_log_likelihood: ``outer_log_likelihood(output, batch)``, a scalar, the sum over the examples.
        init_prec_diag: Precision to start from: a number, or tensors like the parameters.
    """
    return F.Transform(
        partial(init, init_prec_diag=init_prec_diag),
        partial(update, forward=forward, outer_log_likelihood=outer_log_likelihood),
    )


@dataclass
class DiagLaplaceState:
    """A Gaussian with a diagonal precision.

    Attributes:
        params: Its mean.
        prec_diag: The diagonal, tensors like ``params``.
        step: Number of batches, 0-d.
    """

    params: F.Params
    prec_diag: F.Params
    step: Tensor = field(default_factory=lambda: torch.tensor(0))


def init(params: F.Params, init_prec_diag: F.Params | float = 0.0) -> DiagLaplaceState:
    """The state before any data."""
    F.check_params(params)
    if isinstance(init_prec_diag, dict):
        return DiagLaplaceState(params, {name: init_prec_diag[name].clone() for name in params})
    return DiagLaplaceState(params, {name: torch.full_like(p, init_prec_diag) for name, p in params.items()})


def update(
    state: DiagLaplaceState,
    batch: Any,
    forward: F.Forward,
    outer_log_likelihood: F.OuterLogLikelihood,
    inplace: bool = False,
) -> tuple[DiagLaplaceState, Any]:
    """Add the diagonal of a batch.

    Args:
        state: So far.
        batch: Argument of ``forward``; tensors with the leading dimension of its first one are split into examples.
        forward: See :func:`build`.
        outer_log_likelihood: See :func:`build`.
        inplace: Change the state and its tensors in place of making others.

    Returns:
        The state, and what ``forward`` gave besides its output.

    Raises:
        ValueError: If the log-likelihood is not a sum over the examples.
    """
    backend = F.FunctionalBackend(state.params, forward, outer_log_likelihood)
    new = F.unflatten(backend.diag(batch, batch)[1], state.params)
    total = {name: old.add_(new[name]) if inplace else old + new[name] for name, old in state.prec_diag.items()}
    return F.advance(state, inplace, prec_diag=total), backend.aux


def sample(
    state: DiagLaplaceState, sample_shape: tuple[int, ...] = (), generator: torch.Generator | None = None
) -> F.Params:
    """Draws ``{name: (*sample_shape, *shape)}``; from the global random state without a generator.

    Raises:
        ValueError: If some entry of the precision is zero.
    """
    precision = F.flatten(state.prec_diag)
    if not bool((precision > 0).all()):
        raise ValueError("the precision is not positive everywhere, so there is no Gaussian. Pass init_prec_diag > 0.")
    return F.around(state.params, sample_shape, generator, lambda noise: noise * precision.rsqrt())
