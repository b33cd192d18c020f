"""Binary cross-entropy, on logits and on probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, logsigmoid

from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.loss import register_loss
from curvature.losses.terms import noise


@register_loss(nn.BCEWithLogitsLoss)
class BinaryCrossEntropy(ElementwiseLoss):
    r"""``nn.BCEWithLogitsLoss`` with ``weight`` ``w`` and ``pos_weight`` ``a``, for targets ``y`` in [0, 1].

    With :math:`p = \sigma(z)`, :math:`\ell = -w\,(a y \log p + (1 - y) \log(1 - p))` and the mass
    :math:`m = w\,(a y + 1 - y)`,

    .. math:: \ell' = m p - w a y, \qquad \ell'' = m\, p (1 - p).

    A sample is :math:`\sqrt{m}\,(p - \hat y)` with :math:`\hat y \sim \operatorname{Bernoulli}(p)`. A mean loss divides
    by the number of entries, whatever the weights, as PyTorch does.
    """

    zero_when_perfect = True
    convex = True
    hessian_is_fisher = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``-w (a y log p + (1 - y) log(1 - p))``."""
        return -self._weight(z) * (self._pos_weight(z) * y * logsigmoid(z) + (1 - y) * logsigmoid(-z))

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``w ((1 - y) p - a y (1 - p))``, free of cancellation for confident outputs."""
        return self._weight(z) * ((1 - y) * z.sigmoid() - self._pos_weight(z) * y * (-z).sigmoid())

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``m p (1 - p)``."""
        return self._mass(z, y) * z.sigmoid() * (-z).sigmoid()

    def draw(self, z: Tensor, y: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """``sqrt(m) (p - y)`` with ``y`` drawn from the model."""
        p = z.sigmoid()
        uniform = noise(z.shape, z, generator).uniform_(generator=generator).to(z.device)
        return self._mass(z, y).sqrt() * (p - (uniform < p).to(p))

    def check_values(self, output: Tensor, target: Tensor, *extra: Tensor) -> None:
        """Targets in [0, 1], weights not negative."""
        _check_unit_interval(target, "Targets")
        for name in ("weight", "pos_weight"):
            weight = getattr(self.loss_fn, name)
            if weight is not None and not (weight >= 0).all():
                raise ValueError(f"{name} must not be negative, got a smallest entry of {weight.min().item()}.")

    def weight_of(self, z: Tensor) -> Tensor | None:
        return None if self.loss_fn.weight is None else self._weight(z)

    def _weight(self, z: Tensor) -> Tensor:
        return _option(self.loss_fn.weight, z)

    def _pos_weight(self, z: Tensor) -> Tensor:
        return _option(self.loss_fn.pos_weight, z)

    def _mass(self, z: Tensor, y: Tensor) -> Tensor:
        return self._weight(z) * (self._pos_weight(z) * y + 1 - y)


@register_loss(nn.BCELoss)
class BinaryCrossEntropyOnProbabilities(ElementwiseLoss):
    r"""``nn.BCELoss``, whose input is a probability ``p``: :math:`\ell'' = w\,(y / p^2 + (1 - y) / (1 - p)^2)`.

    This Hessian depends on the target, so it is not the Fisher information :math:`w / (p (1 - p))` of the
    probabilities, only equal to it in expectation over targets; its samples are normal with variance
    :math:`\ell''`. The Gauss-Newton matrix of the same model differs from that on logits, the Fisher is the same; where
    a probability is exactly wrong, the Hessian is infinite: prefer ``nn.BCEWithLogitsLoss``.
    """

    zero_when_perfect = True
    convex = True
    likelihood = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``-w (y log p + (1 - y) log(1 - p))``, logarithms bounded below by -100 as in PyTorch."""
        wrong = ((z == 0) & (y > 0)) | ((z == 1) & (y < 1))
        # A logarithm that counts nothing is left out, so that its derivatives are zero and not 0 times infinity.
        log_p = torch.where((y == 0) | wrong, 1.0, z).log().clamp(min=-100)
        log_1mp = (-torch.where((y == 1) | wrong, 0.0, z)).log1p().clamp(min=-100)
        value = torch.where(wrong, binary_cross_entropy(z, y, reduction="none"), -(y * log_p + (1 - y) * log_1mp))
        return _option(self.loss_fn.weight, z) * value

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``w (p - y) / (p (1 - p))``, with PyTorch's bound of 1e-12 on the denominator."""
        return _option(self.loss_fn.weight, z) * (z - y) / (z * (1 - z)).clamp(min=1e-12)

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``w (y / p^2 + (1 - y) / (1 - p)^2)``."""
        positive = torch.where(y == 0, 0.0, y / z**2)  # no 0/0 where a probability is exactly right
        negative = torch.where(y == 1, 0.0, (1 - y) / (1 - z) ** 2)
        return _option(self.loss_fn.weight, z) * (positive + negative)

    def information(self, z: Tensor, *extra: Tensor) -> Tensor:
        """``w / (p (1 - p))``; the mean square of the slopes, so zero where ``p`` is exactly 0 or 1."""
        variance = z * (1 - z)
        return _option(self.loss_fn.weight, z) * variance / variance.clamp(min=1e-12) ** 2

    def score(self, z: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """``sqrt(w) (p - y) / (p (1 - p))`` with ``y`` drawn from the model."""
        uniform = noise(z.shape, z, generator).uniform_(generator=generator).to(z.device)
        return _option(self.loss_fn.weight, z).sqrt() * (z - (uniform < z).to(z)) / (z * (1 - z)).clamp(min=1e-12)

    def weight_of(self, z: Tensor) -> Tensor | None:
        return None if self.loss_fn.weight is None else _option(self.loss_fn.weight, z)

    def check_values(self, output: Tensor, target: Tensor, *extra: Tensor) -> None:
        """Outputs and targets in [0, 1]."""
        _check_unit_interval(target, "Targets")
        _check_unit_interval(output, "Outputs (probabilities; for logits use nn.BCEWithLogitsLoss)")


def _option(weight: Tensor | None, z: Tensor) -> Tensor:
    """A weight option of the loss in the output's shape."""
    return torch.ones_like(z) if weight is None else weight.detach().to(z).expand(z.shape)


def _check_unit_interval(x: Tensor, what: str) -> None:
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"{what} must lie in [0, 1], got values from {x.min().item()} to {x.max().item()}.")
