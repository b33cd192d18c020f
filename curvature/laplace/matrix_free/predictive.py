"""Predictions of a linearised model, from samples of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers import Estimate
from solvers.estimates.estimate import Mean


@dataclass(frozen=True, eq=False)
class Predictive:
    """Outputs of the linearised model under samples of its parameters; a normal distribution around :attr:`mean`.

    Attributes:
        mean: The model's output, ``(*output)``; exactly the mean.
        deviations: Outputs under each sample, minus the mean, ``(S, *output)``.
    """

    mean: Tensor
    deviations: Tensor

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

    def probabilities(self, dim: int = -1) -> Estimate:
        """Mean class probabilities, with their standard errors; ``torch.sigmoid`` goes to :meth:`average`.

        Args:
            dim: Class axis of the output, counted from its end.

        Raises:
            ValueError: If the axis is not counted from the end.
        """
        if not -self.mean.dim() <= dim < 0:
            raise ValueError(f"dim counts from the end of the output {tuple(self.mean.shape)}, not {dim}.")
        return self.average(lambda outputs: outputs.softmax(dim))


def _estimate(samples: Tensor) -> Estimate:
    mean = Mean()
    mean.add(samples)
    value, stderr = (t.to(samples.dtype) for t in (mean.value, mean.stderr))
    return Estimate(value, stderr, mean.count, 0, torch.zeros_like(stderr))
