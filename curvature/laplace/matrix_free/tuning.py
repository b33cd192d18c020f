"""Prior precision and noise that maximise the evidence, by MacKay's fixed point."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from curvature.laplace.matrix_free.evidence import StochasticEvidence
from curvature.laplace.matrix_free.linearized import LinearizedLaplace, moved
from curvature.laplace.matrix_free.sampling import PosteriorSampler
from curvature.model.arguments import a, checked, count, one_of, optional
from solvers import Estimate, NotConvergedError, NotConvergedWarning
from solvers.outcome.arguments import flag, number
from solvers.outcome.solution import OnFailure


@dataclass(frozen=True, eq=False)
class Dimensions:
    """Effective dimensions of a posterior.

    Attributes:
        each: For each number of the prior, ``(G,)``.
        total: Their sum, 0-d, with an error of its own.
    """

    each: Estimate
    total: Estimate


@dataclass(frozen=True, eq=False)
class Tuned:
    """Hyperparameters at which the evidence is stationary.

    Attributes:
        posterior: The posterior with them.
        prior_precision: As it was given, ``(G,)``, with the error that comes from the random vectors: at most this, to
            first order.
        sigma_noise: The same for the noise, 0-d; exact where it was not tuned.
        effective_dimension: Of each number of the prior there, ``(G,)``.
        at_bound: Which numbers of the prior ended at a bound, because the evidence grows beyond it, ``(G,)``.
        iterations: Updates that were made.
    """

    posterior: LinearizedLaplace
    prior_precision: Estimate
    sigma_noise: Estimate
    effective_dimension: Estimate
    at_bound: Tensor
    iterations: int


def _check_bounds(name: str, value: Any) -> Any:
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"{name} is a pair (smallest, largest), not {value!r}.")
    low, high = (number(f"each of {name}", end, low=0.0, open_low=True) for end in value)
    if low > high:
        raise ValueError(f"{name} is a pair (smallest, largest), not {value!r}.")
    return value


@checked(
    posterior=a(LinearizedLaplace, "a LinearizedLaplace"),
    noise=optional(flag),
    samples=count(),
    max_iterations=count(),
    bounds=_check_bounds,
    on_failure=one_of(OnFailure),
)
def optimize_evidence(
    posterior: LinearizedLaplace,
    *,
    noise: bool | None = None,
    samples: int = 30,
    generator: torch.Generator | None = None,
    rtol: float = 1e-3,
    max_iterations: int = 100,
    bounds: tuple[float, float] = (1e-8, 1e8),
    on_failure: OnFailure = "raise",
    **options: Any,
) -> Tuned:
    r"""Prior precision and noise that maximise the evidence.

    At a maximum, with the effective dimensions :math:`\gamma_g` and N observations (MacKay, 1992),

    .. math:: p_g = \gamma_g / |\theta^* - \mu_0|_g^2, \qquad \sigma^2 = \frac{2 \ell / T}{N - \sum_g \gamma_g} .

    Each iteration goes half of the way there in logarithms, which at least halves the distance to the solution near it;
    full steps may oscillate. One number for all parameters costs one run of Lanczos whatever the number of iterations
    (:class:`StochasticEvidence`); several take their dimensions from new posterior samples in each iteration, with
    the same noise and from the solutions before (:class:`PosteriorSampler`).

    Args:
        posterior: Where to start. Its prior decides what is tuned: one number, one per tensor, one per parameter.
        noise: Also tune the noise; ``None`` does in regression.
        samples: Random vectors, or posterior samples.
        generator: Where they are drawn from.
        rtol: Relative change of all hyperparameters at which to stop.
        max_iterations: Iterations at most.
        bounds: Smallest and largest prior precision.
        on_failure: Whether to "warn" or to "raise" if they do not suffice; never silent.
        options: With one number those of :class:`StochasticEvidence` (``steps``, ``sketch``), with several those of
            :class:`PosteriorSampler` (``solver``, ``preconditioner``).

    Returns:
        The values, their errors, and the posterior with them.

    Raises:
        ValueError: If noise is to be tuned for a likelihood without noise, or the model explains all observations.
        NotConvergedError: If the tolerance is not met, or a solve has not converged.

    References:
        MacKay (1992), https://doi.org/10.1162/neco.1992.4.3.415; Antoran et al. (2023), section 3.3,
        https://arxiv.org/abs/2210.04994
    """
    noise = posterior.regression if noise is None else noise
    if noise and not posterior.regression:
        raise ValueError("noise=True is for regression; this likelihood has no noise to tune.")
    of = _dimensions(posterior, samples, generator, options)
    distance = posterior.scatter()
    for iteration in range(1, max_iterations + 1):
        gamma = of(posterior)
        prior = (gamma.each.value / distance).nan_to_num(nan=bounds[1], posinf=bounds[1]).clamp(*bounds)
        sigma = _noise(posterior, gamma.total) if noise else posterior.sigma_noise
        change = max(float((prior / posterior.prior.values).log().abs().max()), abs(log(sigma / posterior.sigma_noise)))
        if change <= rtol:
            return _tuned(posterior, gamma, noise, bounds, iteration)
        if iteration < max_iterations:
            posterior = posterior.at((prior * posterior.prior.values).sqrt(), sqrt(sigma * posterior.sigma_noise))
    message = (
        f"prior and noise still change by {change:.2g} after {max_iterations} iterations, more than rtol={rtol:g}. "
        "Allow more max_iterations or a larger rtol."
    )
    if on_failure == "raise":
        raise NotConvergedError(message)
    warnings.warn(message, NotConvergedWarning, stacklevel=2)
    return _tuned(posterior, gamma, noise, bounds, max_iterations)


def _noise(posterior: LinearizedLaplace, effective_dimension: Estimate) -> float:
    """MacKay's estimate of the noise."""
    left = posterior.observations - float(effective_dimension.value)
    if not left > 0:
        raise ValueError(
            f"the effective dimension is {float(effective_dimension.value):.4g} for {posterior.observations} "
            "observations, so no noise is left to tell. Start from a larger prior_precision or sigma_noise, take more "
            "samples, or keep the noise: noise=False."
        )
    return sqrt(2 * float(posterior.loss) / posterior.temperature / left)


def _dimensions(
    posterior: LinearizedLaplace,
    samples: int,
    generator: torch.Generator | None,
    options: dict[str, Any],
) -> Callable[[LinearizedLaplace], Dimensions]:
    if len(posterior.prior.values) > 1:
        sampler = PosteriorSampler(posterior, samples, generator=generator, **options)

        def from_samples(at: LinearizedLaplace) -> Dimensions:
            found = sampler.of(at)
            each, total = found.effective_dimension(), found.effective_dimension(total=True)
            return Dimensions(replace(each, products=sampler.products), replace(total, products=sampler.products))

        return from_samples
    curve = StochasticEvidence(posterior, samples=samples, generator=generator, **options)

    def from_quadrature(at: LinearizedLaplace) -> Dimensions:
        total = curve.effective_dimension(at)
        value, stderr, systematic = (t.reshape(1) for t in (total.value, total.stderr, total.systematic))
        return Dimensions(Estimate(value, stderr, total.samples, total.products, systematic), total)

    return from_quadrature


def _tuned(
    posterior: LinearizedLaplace, gamma: Dimensions, noise: bool, bounds: tuple[float, float], iterations: int
) -> Tuned:
    """The result, with errors to first order: p as gamma, and the noise as the root of what gamma leaves."""
    values = posterior.prior.values
    at_bound = (values <= bounds[0] * 1.01) | (values >= bounds[1] / 1.01)
    ratio = torch.where(at_bound, 0, values / gamma.each.value)
    each = gamma.each
    prior = Estimate(values, ratio * each.stderr, each.samples, each.products, ratio * each.systematic)
    share = posterior.sigma_noise / 2 / (posterior.observations - gamma.total.value) if noise else torch.zeros(())
    sigma = moved(gamma.total, 0.0, torch.tensor(posterior.sigma_noise, dtype=torch.float64, device=values.device))
    stderr, systematic = (share * t for t in (gamma.total.stderr, gamma.total.systematic))
    return Tuned(
        posterior,
        prior,
        Estimate(sigma.value, stderr, sigma.samples, sigma.products, systematic),
        gamma.each,
        at_bound,
        iterations,
    )
