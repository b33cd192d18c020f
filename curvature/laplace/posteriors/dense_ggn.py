"""The Gauss-Newton matrix itself; takes the place of ``posteriors.laplace.dense_ggn``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvature.laplace.posteriors import functional as F


def build(
    forward: F.Forward, outer_log_likelihood: F.OuterLogLikelihood, init_prec: Tensor | float = 0.0
) -> F.Transform:
    """``init`` and ``update`` of a dense approximation; arguments as for :func:`diag_ggn.build`.

    Args:
        forward: Output, one row for each example, and auxiliary information.
        outer_log_likelihood: A scalar, the sum over the examples.
        init_prec: Precision to start from: a matrix ``(P, P)``, or a number times the unit matrix.
    """
    return F.Transform(
        partial(init, init_prec=init_prec),
        partial(update, forward=forward, outer_log_likelihood=outer_log_likelihood),
    )


@dataclass
class DenseLaplaceState:
    """A Gaussian with a dense precision.

    Attributes:
        params: Its mean.
        prec: The precision ``(P, P)``, with the parameters in sorted order of their names.
        step: Number of batches, 0-d.
    """

    params: F.Params
    prec: Tensor
    step: Tensor = field(default_factory=lambda: torch.tensor(0))


def init(params: F.Params, init_prec: Tensor | float = 0.0) -> DenseLaplaceState:
    """The state before any data, in the dtype of the parameters."""
    mean = F.flatten(F.check_params(params))
    if isinstance(init_prec, Tensor) and init_prec.dim():
        if init_prec.shape != (len(mean), len(mean)):
            raise ValueError(f"init_prec must be {len(mean)} x {len(mean)} or a number, got {tuple(init_prec.shape)}.")
        return DenseLaplaceState(params, init_prec.to(mean).clone())
    return DenseLaplaceState(params, init_prec * torch.eye(len(mean), dtype=mean.dtype, device=mean.device))


def update(
    state: DenseLaplaceState,
    batch: Any,
    forward: F.Forward,
    outer_log_likelihood: F.OuterLogLikelihood,
    inplace: bool = False,
) -> tuple[DenseLaplaceState, Any]:
    """Add the matrix of a batch; as :func:`diag_ggn.update`."""
    backend = F.FunctionalBackend(state.params, forward, outer_log_likelihood)
    new = backend.full(batch, batch)[1]
    return F.advance(state, inplace, prec=state.prec.add_(new) if inplace else state.prec + new), backend.aux


def sample(
    state: DenseLaplaceState, sample_shape: tuple[int, ...] = (), generator: torch.Generator | None = None
) -> F.Params:
    """Draws ``{name: (*sample_shape, *shape)}``; from the global random state without a generator.

    Raises:
        ValueError: If the precision is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(state.prec)
    if bool(info):
        raise ValueError("the precision is not positive definite, so there is no Gaussian. Pass init_prec > 0.")
    return F.around(
        state.params,
        sample_shape,
        generator,
        lambda noise: torch.linalg.solve_triangular(factor, noise.unsqueeze(-2), upper=False, left=False).squeeze(-2),
    )
