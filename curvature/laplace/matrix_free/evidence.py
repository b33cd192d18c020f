r"""The evidence of a Laplace posterior by stochastic Lanczos quadrature, where no factor of the curvature fits.

With the curvature whitened by the prior, :math:`\hat H = a P^{-1/2} H P^{-1/2}`, what depends on hyperparameters is the
trace of a function of it:

.. math:: \log \frac{|a H + P|}{|P|} = \operatorname{tr} \log(I + \hat H), \qquad
    \gamma = \operatorname{tr} a H (a H + P)^{-1} = \operatorname{tr} \hat H (I + \hat H)^{-1} .
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.laplace.matrix_free.linearized import LinearizedLaplace, moved
from curvature.laplace.matrix_free.traces import SKETCH, WhitenedTraces, seed_from
from curvature.model.arguments import a, checked, count, optional
from solvers import Estimate, Nystrom


@dataclass(frozen=True, eq=False)
class Evidence:
    r"""Log marginal likelihood of a Laplace posterior.

    .. math:: \log p(D | \theta^*) - \tfrac12 (\theta^* - \mu_0)^\top P (\theta^* - \mu_0)
        - \tfrac12 \log \frac{|a H + P|}{|P|}

    Attributes:
        value: The log marginal likelihood, with its standard error.
        log_likelihood: :math:`\log p(D | \theta^*)`, exact.
        scatter: :math:`s = (\theta^* - \mu_0)^\top P (\theta^* - \mu_0)`, exact.
        log_det_ratio: :math:`\log |aH + P| - \log |P|`.
        effective_dimension: :math:`\gamma = \operatorname{tr} a H (a H + P)^{-1}`: how many parameters the data
            determine.
        prior_gradient: Derivative of the value in the logarithm of a factor common to all prior precisions.
        noise_gradient: Derivative in the logarithm of the noise; ``None`` without noise.
    """

    value: Estimate
    log_likelihood: Tensor
    scatter: Tensor
    log_det_ratio: Estimate
    effective_dimension: Estimate
    prior_gradient: Estimate
    noise_gradient: Estimate | None


class StochasticEvidence:
    """The log marginal likelihood as a function of the hyperparameters, all estimated from the same random vectors.

    Calls that change the noise, the temperature or a common factor of the prior precision cost no products, unless the
    quadrature has to be refined for them; a prior of another shape costs a run of Lanczos. As the vectors are the same,
    differences between hyperparameters are far more exact than the values, and for a prior of one number the gradients
    are those of the estimated value.

    Args:
        posterior: The posterior.
        samples: Random vectors; the whole space is taken, without statistical error, if it has no more dimensions.
        steps: Products per vector at most. They grow as the root of ``1 + |H^|``, so a larger prior precision makes the
            estimate cheap; what a quadrature lacks is part of the standard error.
        sketch: The best determined directions, for as many products as its rank, as a control variate: the random
            vectors then estimate what it leaves out. ``None`` saves its memory, of as many vectors as its rank.
        batch_size: Vectors per product; ``None`` takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; ``None`` draws the same ones each time.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Ubaru, Chen and Saad (2017), https://doi.org/10.1137/16M1104974; Dong et al. (2017), on evidence and its
        gradients, https://arxiv.org/abs/1711.03481; Persson, Cortinovis and Kressner (2022), on sketches and traces,
        https://arxiv.org/abs/2109.10659; Wenger et al. (2022), the same for evidence,
        https://arxiv.org/abs/2107.00243; MacKay (1992), https://doi.org/10.1162/neco.1992.4.3.415
    """

    @checked(
        posterior=a(LinearizedLaplace, "a LinearizedLaplace"),
        samples=count(),
        steps=count(),
        sketch=optional(a(Nystrom, "a Nystrom")),
        batch_size=optional(count()),
    )
    def __init__(
        self,
        posterior: LinearizedLaplace,
        *,
        samples: int = 30,
        steps: int = 100,
        sketch: Nystrom | None = SKETCH,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.posterior = posterior
        seed = seed_from(generator)
        self.traces = WhitenedTraces(posterior, samples, steps, sketch, batch_size, seed)

    @property
    def products(self) -> int:
        """Products with the curvature that were spent, counted in vectors."""
        return self.traces.products

    def __call__(
        self,
        prior_precision: float | Tensor | None = None,
        sigma_noise: float | Tensor | None = None,
        temperature: float | None = None,
    ) -> Evidence:
        """The evidence at the posterior's hyperparameters, or at others.

        Raises:
            NotPositiveDefiniteError: If ``a H + P`` is seen not to be positive definite.
            NonFiniteError: If a product holds NaN or infinity.
        """
        return self.of(self.posterior.at(prior_precision, sigma_noise, temperature))

    def of(self, posterior: LinearizedLaplace) -> Evidence:
        """The evidence of a posterior that differs in hyperparameters only."""
        log_det, gamma = self.traces(posterior)
        scatter = (posterior.prior.values * posterior.scatter()).sum()
        log_likelihood = posterior.log_likelihood
        return Evidence(
            value=moved(log_det, -0.5, log_likelihood - scatter / 2),
            log_likelihood=log_likelihood,
            scatter=scatter,
            log_det_ratio=log_det,
            effective_dimension=gamma,
            prior_gradient=posterior.prior_gradient(gamma),
            noise_gradient=posterior.noise_gradient(gamma),
        )

    def effective_dimension(self, posterior: LinearizedLaplace) -> Estimate:
        """That of all parameters, 0-d."""
        return self.traces(posterior)[1]


def evidence(
    posterior: LinearizedLaplace,
    *,
    samples: int = 30,
    steps: int = 100,
    sketch: Nystrom | None = SKETCH,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Evidence:
    """Log marginal likelihood of a posterior, with its standard error and its gradients.

    Arguments and errors are those of :class:`StochasticEvidence`, which serves many hyperparameters at the cost of one.

    >>> import torch
    >>> from curvature.laplace import LinearizedLaplace, evidence
    >>> model = torch.nn.Linear(3, 1)
    >>> data = torch.randn(20, 3), torch.randn(20, 1)
    >>> found = evidence(LinearizedLaplace(model, "regression", data, sigma_noise=0.5))
    >>> 0 < found.effective_dimension.value < 4
    tensor(True)
    """
    return StochasticEvidence(
        posterior, samples=samples, steps=steps, sketch=sketch, batch_size=batch_size, generator=generator
    )()
