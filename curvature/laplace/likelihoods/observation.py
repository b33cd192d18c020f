r"""Mean and variance of an observation, given the outputs f of the model: the inverse link of each likelihood.

| likelihood | mean | variance |
| --- | --- | --- |
| categorical, ``nn.CrossEntropyLoss`` | :math:`p = \operatorname{softmax} f` | :math:`p (1 - p)` of each class |
| Bernoulli, ``nn.BCEWithLogitsLoss`` | :math:`p = \sigma(f)` of each output | :math:`p (1 - p)` |
| Poisson, ``nn.PoissonNLLLoss`` | the rate :math:`e^f` | :math:`e^f` |
| normal, ``nn.MSELoss`` | f | :math:`\sigma^2` |
| normal with given variances, ``nn.GaussianNLLLoss`` | f | comes with the data |

A linear link is one whose outputs may be any number. Losses on probabilities or rates (``nn.BCELoss``,
``nn.PoissonNLLLoss(log_input=False)``) have none, since a linearised model leaves their range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.losses import (
    BinaryCrossEntropy,
    BinaryCrossEntropyOnProbabilities,
    CrossEntropy,
    GaussianNLL,
    Loss,
    PoissonNLL,
    SquaredError,
)
from curvature.losses.terms import Layout


class Moments(NamedTuple):
    """Of an observation, as functions of the outputs and the class axis, counted from the end.

    Attributes:
        mean: The inverse link.
        variance: ``None`` where the outputs do not say it.
        probability: Whether the mean is a probability.
    """

    mean: Callable[[Tensor, int], Tensor]
    variance: Callable[[Tensor, int], Tensor] | None
    probability: bool


def _softmax(f: Tensor, axis: int) -> Tensor:
    return f.softmax(axis)


def _sigmoid(f: Tensor, axis: int) -> Tensor:
    return f.sigmoid()


#: By the name of the distribution; the variance of "normal" has the noise besides.
MOMENTS: dict[str, Moments] = {
    "categorical": Moments(_softmax, lambda f, axis: (p := _softmax(f, axis)) * (1 - p), True),
    "bernoulli": Moments(_sigmoid, lambda f, axis: f.sigmoid() * (-f).sigmoid(), True),
    "poisson": Moments(lambda f, axis: f.exp(), lambda f, axis: f.exp(), False),
    "normal": Moments(lambda f, axis: f, lambda f, axis: torch.zeros_like(f), False),
    "normal with given variances": Moments(lambda f, axis: f, None, False),
}


@dataclass(frozen=True)
class Observation:
    """The distribution of an observation, given the outputs of the model.

    Attributes:
        distribution: A name among those above; empty where there is no link, for the :attr:`reason`.
        rank: Number of axes of the outputs that the posterior was made from; ``None`` without a class axis.
        class_axis: Class axis of these, for categorical ones.
        noise: Standard deviation of the noise, for normal ones.
        reason: Why there is no link, and what to do.
    """

    distribution: str
    rank: int | None = None
    class_axis: int | None = None
    noise: float | None = None
    reason: str = ""

    @property
    def is_probability(self) -> bool:
        """Whether the mean is a probability."""
        return self._moments.probability

    def mean(self, f: Tensor, like: Tensor) -> Tensor:
        """Of an observation; for outputs ``(*batch, *output)``, where ``like`` has the shape ``(*output)``."""
        return self._moments.mean(f, self.axis(like))

    def variance(self, f: Tensor, like: Tensor) -> Tensor:
        """Of an observation around :meth:`mean`.

        Raises:
            ValueError: If the outputs do not say it.
        """
        variance = self._moments.variance
        if variance is None:
            raise ValueError(
                f"the variance of an observation that is {self.distribution} comes with the data, not from the model. "
                "Add it to variance(), which is that of the function."
            )
        return variance(f, self.axis(like)) + (self.noise or 0.0) ** 2

    def axis(self, like: Tensor) -> int:
        """The class axis, counted from the end; the last where there is none.

        Raises:
            ValueError: If the outputs have another number of axes than those that the posterior was made from.
        """
        if self.class_axis is None or self.rank is None or self.class_axis == self.rank - 1:
            return -1
        if like.dim() != self.rank:
            raise ValueError(
                f"the posterior was made from outputs of {self.rank} axes with the classes on axis {self.class_axis}; "
                f"these have the shape {tuple(like.shape)}."
            )
        return self.class_axis - self.rank

    @property
    def _moments(self) -> Moments:
        if not self.distribution:
            raise ValueError(
                f"{self.reason} average(function) gives the mean of any function of the outputs, with its error."
            )
        return MOMENTS[self.distribution]

    def state_dict(self) -> dict[str, Any]:
        """Strings and numbers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Observation:
        """Restore :meth:`state_dict`; samples from before it was kept do not know their likelihood."""
        unknown = "these samples were saved by a version that did not keep the likelihood, so the link is not known."
        return cls("", reason=unknown) if state is None else cls(**state)


@singledispatch
def observation(loss: Loss, layout: Layout, noise: float) -> Observation:
    """The distribution of an observation under a likelihood.

    Args:
        loss: The negative log-likelihood.
        layout: Which axes of the outputs belong to one term.
        noise: Standard deviation of normal noise.
    """
    return Observation("", reason=f"no link is known for {loss!r}, whose outputs may mean anything.")


@observation.register
def _categorical(loss: CrossEntropy, layout: Layout, noise: float) -> Observation:
    return Observation("categorical", len(layout.output_shape), layout.class_axes[0])


@observation.register
def _bernoulli(loss: BinaryCrossEntropy, layout: Layout, noise: float) -> Observation:
    return Observation("bernoulli")


@observation.register
def _probabilities(loss: BinaryCrossEntropyOnProbabilities, layout: Layout, noise: float) -> Observation:
    why = (
        "nn.BCELoss takes probabilities, and the outputs of the linearised model leave [0, 1]. End the model at its "
        "logits and take nn.BCEWithLogitsLoss."
    )
    return Observation("", reason=why)


@observation.register
def _poisson(loss: PoissonNLL, layout: Layout, noise: float) -> Observation:
    if loss.loss_fn.log_input:
        return Observation("poisson")
    why = (
        "nn.PoissonNLLLoss(log_input=False) takes rates, and the outputs of the linearised model may be negative. End "
        "the model at the logarithms of the rates and take nn.PoissonNLLLoss()."
    )
    return Observation("", reason=why)


@observation.register
def _normal(loss: SquaredError, layout: Layout, noise: float) -> Observation:
    return Observation("normal", noise=noise)


@observation.register
def _given_variances(loss: GaussianNLL, layout: Layout, noise: float) -> Observation:
    return Observation("normal with given variances")
