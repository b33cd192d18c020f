"""Predictions of a linearised model, from samples of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.laplace.likelihoods.observation import Observation
from solvers import Estimate
from solvers.estimates.estimate import Mean

#: Outputs that are logits of classes along the last axis.
CLASSES = Observation("categorical")


@dataclass(frozen=True, eq=False)
class Predictive:
    """Outputs of the linearised model under samples of its parameters; a normal distribution around :attr:`mean`.

    Attributes:
        mean: The model's output, ``(*output)``; exactly the mean.
        deviations: Outputs under each sample, minus the mean, ``(S, *output)``.
        observation: What the likelihood says about an observation, given the outputs. That of samples is their
            posterior's; outputs by themselves are taken for logits of classes along the last axis.
    """

    mean: Tensor
    deviations: Tensor
    observation: Observation = CLASSES

    @property
    def values(self) -> Tensor:
        """Outputs under each sample, ``(S, *output)``."""
        return self.mean + self.deviations

    def variance(self) -> Estimate:
        """Variance of each output, with its standard error, ``(*output)``.

        That of the function: in regression an observation has the noise's ``sigma_noise ** 2`` besides.
        """
        return _estimate(self.deviations.square())

    def average(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Mean of a function of the outputs, with its standard error.

        Each sample counts with its mirror image, which is as probable, so the odd part adds no error.

        Args:
            function: Acts on outputs ``(S, *output)``, each alone.
        """
        both = function(self.mean + self.deviations) + function(self.mean - self.deviations)
        return _estimate(both / 2)

    def probabilities(self, dim: int | None = None) -> Estimate:
        """Mean probabilities under a categorical or a Bernoulli likelihood, with their standard errors, ``(*output)``.

        The softmax over the class axis of ``nn.CrossEntropyLoss``, wherever it lies; the sigmoid of each output for
        ``nn.BCEWithLogitsLoss``.

        Args:
            dim: Class axis of the output, counted from its end, to be checked against that of the posterior.

        Raises:
            ValueError: If the likelihood has no probabilities, or another class axis.
        """
        if not self.observation.is_probability:
            raise ValueError(
                f"an observation that is {self.observation.distribution} has no class probabilities. "
                "observation_mean() and observation_variance() are those of an observation."
            )
        if dim is not None:
            self._check_axis(dim)
        return self.observation_mean()

    def _check_axis(self, dim: int) -> None:
        if self.observation.distribution != "categorical":
            raise ValueError(
                f"dim={dim} is a class axis, and every output is a yes or no of its own here; leave it out."
            )
        if not -self.mean.dim() <= dim < 0:
            raise ValueError(f"dim counts from the end of the output {tuple(self.mean.shape)}, not {dim}.")
        if dim % self.mean.dim() != self.observation.axis(self.mean) % self.mean.dim():
            raise ValueError(
                f"dim={dim} is not the class axis of the posterior, which is {self.observation.axis(self.mean)} of the "
                f"output {tuple(self.mean.shape)}. Leave dim out."
            )

    def observation_mean(self) -> Estimate:
        r"""Mean of an observation, :math:`\operatorname{E}\, h(f)` with the inverse link h, ``(*output)``.

        Probabilities (categorical, Bernoulli), rates (Poisson, with ``log_input``), or the output itself (normal).

        Raises:
            ValueError: If the likelihood has no link that is known; the message names the way.
        """
        return self.average(lambda f: self.observation.mean(f, self.mean))

    def observation_variance(self) -> Estimate:
        r"""Variance of an observation, ``(*output)``: what the likelihood leaves open, and what the parameters do.

        .. math:: \operatorname{Var} y = \operatorname{E} \operatorname{Var}[y | f] + \operatorname{Var} h(f)

        In regression that is :math:`\sigma^2` and :meth:`variance`. The standard error is to first order.

        Raises:
            ValueError: If the likelihood has no link that is known, or its variance comes with the data.
        """

        def both(f: Tensor) -> tuple[Tensor, Tensor]:
            h = self.observation.mean(f, self.mean)
            return h, self.observation.variance(f, self.mean) + h.square()

        (h, second), (mirrored, other) = both(self.mean + self.deviations), both(self.mean - self.deviations)
        h, second = (h + mirrored) / 2, (second + other) / 2
        center = h.mean(0)
        # E y^2 - (E y)^2 around its linearisation in both means, in differences from the center.
        return _estimate(second - 2 * center * h + center.square())


def _estimate(samples: Tensor) -> Estimate:
    mean = Mean()
    mean.add(samples)
    value, stderr = (t.to(samples.dtype) for t in (mean.value, mean.stderr))
    return Estimate(value, stderr, mean.count, 0, torch.zeros_like(stderr))
