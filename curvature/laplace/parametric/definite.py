"""No posterior without a positive definite precision: there is no Gaussian, and no evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from laplace import DiagLaplace, FullLaplace
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch makes it without a stub

from curvature.laplace.parametric.adopted import in_front_of
from solvers import NotPositiveDefiniteError

Read = Callable[[], Tensor]


class IndefinitePosteriorError(NotPositiveDefiniteError, LinAlgError):
    """Curvature plus prior has an eigenvalue that is not positive. A grid of priors passes over those."""


def refuse_indefinite(la: Any) -> None:
    """Raise unless the precision ``a H + P`` of a posterior with a dense or diagonal H is positive definite.

    Raises:
        IndefinitePosteriorError: With the smallest eigenvalue.
    """
    precision = la.posterior_precision.detach()
    if precision.dim() == 1:
        smallest = precision.min()
    elif not bool(torch.linalg.cholesky_ex(precision).info):
        return
    else:
        smallest = torch.linalg.eigvalsh(precision.double()).min()
    if not bool(smallest > 0):
        word = "entry" if precision.dim() == 1 else "eigenvalue"
        raise IndefinitePosteriorError(
            f"the curvature plus the prior is not positive definite (smallest {word} {float(smallest):.3g}, at a prior "
            f"precision of {float(la.prior_precision.detach().min()):.3g}), so there is no Gaussian around these "
            "parameters, and no evidence. (a) The Hessian has negative eigenvalues away from a minimum: train on, or "
            "take backend=GGNBackend, which has none. (b) Take a larger prior_precision. (c) In float32 small "
            "eigenvalues drown in the rounding of large ones: use float64."
        )


@in_front_of(FullLaplace, DiagLaplace)
def log_det_posterior_precision(la: Any, plain: Read) -> Tensor:
    """The determinant of an indefinite matrix may be positive, so its sign says nothing."""
    refuse_indefinite(la)
    return plain()


@in_front_of(FullLaplace, DiagLaplace)
def posterior_scale(la: Any, plain: Read) -> Tensor:
    """What samples and predictions of these classes are made of."""
    refuse_indefinite(la)
    return plain()


@in_front_of(DiagLaplace)
def posterior_variance(la: Any, plain: Read) -> Tensor:
    """Never negative."""
    refuse_indefinite(la)
    return plain()
