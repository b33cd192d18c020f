r"""The evidence of a Laplace posterior by stochastic Lanczos quadrature, where no factor of the curvature fits.

With the curvature whitened by the prior, :math:`\hat H = a P^{-1/2} H P^{-1/2}`, everything that depends on
hyperparameters is a trace of a function of it:

.. math:: \log \frac{|a H + P|}{|P|} = \operatorname{tr} \log(I + \hat H), \qquad
    \gamma = \operatorname{tr} a H (a H + P)^{-1} = \operatorname{tr} \hat H (I + \hat H)^{-1} .

A common factor of P, the noise and the temperature multiply :math:`\hat H` by a number, hence the nodes of its
quadratures: those of one run of Lanczos serve all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.laplace.linearized import LinearizedLaplace, moved
from solvers import Estimate, NotPositiveDefiniteError
from solvers.estimate import Mean
from solvers.lanczos import Quadrature, quadrature, remaining
from solvers.probes import default_batch, flat_product, signs


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
        noise_gradient: Derivative in the logarithm of the noise; ``None`` where there is none.
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
        batch_size: Vectors per product; ``None`` takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; ``None`` draws the same ones each time.

    Attributes:
        products: Products with the curvature that were spent, counted in vectors.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Ubaru, Chen and Saad (2017), https://doi.org/10.1137/16M1104974; Dong et al. (2017), on evidence and its
        gradients, https://arxiv.org/abs/1711.03481; MacKay (1992), https://doi.org/10.1162/neco.1992.4.3.415
    """

    def __init__(
        self,
        posterior: LinearizedLaplace,
        *,
        samples: int = 30,
        steps: int = 100,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, number in (("samples", samples), ("steps", steps)):
            if number < 1:
                raise ValueError(f"{name} is at least 1, not {number}.")
        self.posterior, self.steps = posterior, steps
        n = posterior.parameters.size
        self.whole = samples >= n
        self.samples = min(samples, n)
        self._batch = default_batch(posterior.curvature, batch_size)
        # A seed, not the vectors: they are as large as the model, and there are many.
        seed = torch.empty((), dtype=torch.int64)
        self._seed = 0 if generator is None else int(seed.random_(generator=generator))
        self.products = 0
        self._shape: Tensor | None = None
        self._rules: list[Quadrature] = []

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
        log_det, gamma = self._traces(posterior)
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
        return self._traces(posterior)[1]

    def _traces(self, posterior: LinearizedLaplace) -> tuple[Estimate, Estimate]:
        """Traces of ``log(I + H^)`` and ``H^ (I + H^)^-1``."""
        # H^ is this number times the curvature whitened by the shape of the prior alone
        largest = posterior.prior.values.max()
        factor = posterior.scale / float(largest)
        n = posterior.parameters.size
        means, changes = Mean(), Mean()
        for rule in self._quadratures(posterior, posterior.prior.values / largest, factor):
            values, change = self._integrals(rule, factor)
            means.add(n * values)
            changes.add(n * change.transpose(0, 1))
        systematic = remaining(changes.value)
        stderr = torch.hypot(torch.zeros_like(systematic) if self.whole else means.stderr, systematic)
        spent = 0 if self.whole else self.samples
        logarithm, share = (
            Estimate(means.value[i], stderr[i], spent, self.products, systematic[i]) for i in range(len(stderr))
        )
        return logarithm, share

    def _quadratures(self, posterior: LinearizedLaplace, shape: Tensor, factor: float) -> list[Quadrature]:
        """Quadratures of the curvature whitened by a prior of this shape, good enough for this factor."""
        known = self._shape is not None and self._shape.shape == shape.shape
        if not (known and torch.allclose(shape, self._shape, rtol=1e-12, atol=0)):  # type: ignore[arg-type]
            self._shape, self._rules = shape, []
        most = min(self.steps, posterior.parameters.size)
        if self._rules and all(rule.steps >= most or self._settled(rule, factor, 0.2) for rule in self._rules):
            return self._rules
        op = posterior.at(shape, 1.0, 1.0).whitened()
        if self.whole:
            self.products += self.samples
            values = torch.linalg.eigvalsh(op.to_dense().double()).unsqueeze(0)
            pair = values, torch.full_like(values, 1 / values.numel())
            self._rules = [Quadrature(*pair, (pair, pair))]
            return self._rules
        generator = torch.Generator(op.device).manual_seed(self._seed)
        product, self._rules = flat_product(op), []
        for start in range(0, self.samples, self._batch):
            vectors = signs(op, min(self._batch, self.samples - start), generator)
            rule = quadrature(op, product, vectors, self.steps, lambda rule: self._settled(rule, factor, 0.05))
            self.products += len(vectors) * rule.steps
            self._rules.append(rule)
        return self._rules

    def _settled(self, rule: Quadrature, factor: float, share: float) -> bool:
        """Whether what more steps would change is at most this share of what the random vectors leave open."""
        values, changes = self._integrals(rule, factor)
        spread = values.std(0) * self.samples**-0.5 if len(values) > 1 else torch.zeros_like(values[0])
        floor = torch.finfo(self.posterior.curvature.dtype).eps ** 0.5 * values.mean(0).abs()
        return bool((remaining(changes.mean(1)) <= torch.maximum(share * spread, floor)).all())

    def _integrals(self, rule: Quadrature, factor: float) -> tuple[Tensor, Tensor]:
        """Quadratures of both functions for each vector ``(m, 2)``, and what the steps changed ``(2, m, 2)``."""
        noise = torch.finfo(self.posterior.curvature.dtype).eps * rule.nodes.abs().amax()

        def both(nodes: Tensor) -> Tensor:
            theta = factor * torch.where(nodes.abs() <= noise, 0, nodes)
            bad = theta <= -1
            if nodes is rule.nodes and bool((bad & (rule.weights > torch.finfo(torch.float64).eps)).any()):
                raise NotPositiveDefiniteError(
                    f"the precision of {self.posterior!r} has the eigenvalue {float(1 + theta.min()):.3g} in units of "
                    "the prior precision: the loss is not convex in the outputs. Use a larger prior precision."
                )
            theta = torch.where(bad, 0, theta)
            return torch.stack([theta.log1p(), theta / (1 + theta)], -1)

        return rule.apply(both)


def evidence(
    posterior: LinearizedLaplace,
    *,
    samples: int = 30,
    steps: int = 100,
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
    return StochasticEvidence(posterior, samples=samples, steps=steps, batch_size=batch_size, generator=generator)()
