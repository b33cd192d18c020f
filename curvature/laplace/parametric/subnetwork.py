"""Distances from the mean of a posterior over a part of the parameters, which laplace-torch takes of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from laplace import DiagLaplace, FullLaplace
from laplace.baselaplace import ParametricLaplace
from laplace.subnetlaplace import SubnetLaplace
from torch import Tensor

from curvature.laplace.parametric.adopted import in_front_of


@in_front_of(FullLaplace, DiagLaplace)
def square_norm(la: Any, plain: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Of the entries of the subnetwork, in units of the posterior."""
    if not isinstance(la, SubnetLaplace):
        return plain(value)
    delta, P = (value - la.mean)[la.backend.subnetwork_indices], la.posterior_precision
    return delta @ (P @ delta if P.dim() == 2 else P * delta)


@in_front_of(ParametricLaplace)
def log_prob(la: Any, plain: Callable[..., Tensor], value: Tensor, normalized: bool = True) -> Tensor:
    """Logarithm of the density of the entries of the subnetwork."""
    if not isinstance(la, SubnetLaplace) or not normalized:
        return plain(value, normalized)
    constant = (la.log_det_posterior_precision - la.n_params_subnet * math.log(2 * math.pi)) / 2
    return constant - la.square_norm(value) / 2
