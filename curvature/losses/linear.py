"""Losses that are linear in the model's output: value and gradient, but no curvature to take a Gauss-Newton step with.

Their Hessian with respect to the output is zero, so the Gauss-Newton matrix is zero for every model. That is never
useful, so every request for it is refused with advice. The empirical Fisher needs gradients only and works, and so does
the Fisher of those that are likelihoods.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from curvature.losses.classes import Labels, class_layout, class_weights, drawn_classes, read_labels, refuse_one_class
from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.errors import EMPIRICAL, NoCurvatureError, NoLikelihoodError
from curvature.losses.loss import Loss, register_loss
from curvature.losses.terms import Layout, Terms, noise
from solvers.precision import widen


def _refuse(name: str, remedy: str) -> NoReturn:
    raise NoCurvatureError(
        f"{name} is linear in the model's output, so its Hessian and Gauss-Newton matrix there are zero. {remedy}, or "
        f"use {EMPIRICAL}, which needs gradients only."
    )


@register_loss(nn.L1Loss)
class L1(ElementwiseLoss):
    r"""``nn.L1Loss``: :math:`\ell = |z - y|`; no curvature.

    The Fisher information of its likelihood, the Laplace distribution of unit scale, is one.
    """

    zero_when_perfect = True

    likelihood = True

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``|z - y|``."""
        return (z - y).abs()

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``sign(z - y)``."""
        return (z - y).sign()

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """Refused."""
        _refuse("nn.L1Loss", "Use curvature.fisher, nn.HuberLoss or nn.SmoothL1Loss with a small threshold")

    def information(self, z: Tensor, *extra: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(z)

    def score(self, z: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """Signs."""
        uniform = noise(z.shape, z, generator).uniform_(generator=generator).to(z.device)
        return torch.where(uniform < 0.5, -torch.ones_like(z), torch.ones_like(z))


@register_loss(nn.KLDivLoss)
class KLDivergence(ElementwiseLoss):
    r"""``nn.KLDivLoss`` on log-probabilities ``z``: :math:`\ell = y (\log y - z)`; no curvature.

    ``reduction="batchmean"`` divides by the number of examples.
    """

    without_likelihood = (
        "Use nn.CrossEntropyLoss on logits with class probabilities as targets, which is this loss up to a constant, "
        "or kind='empirical'."
    )

    @property
    def reduction(self) -> str:
        """``"batchmean"`` is a mean with another divisor."""
        return "mean" if self.loss_fn.reduction == "batchmean" else super().reduction

    def total(self, mask: Tensor, outputs: int) -> Tensor:
        """The number of entries, or of examples with a term that counts."""
        return mask.any(1).sum() if self.loss_fn.reduction == "batchmean" else super().total(mask, outputs)

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``y (log y - z)``."""
        return y.exp() * (y - z) if self.loss_fn.log_target else torch.xlogy(y, y) - y * z

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``-y``."""
        return -y.exp() if self.loss_fn.log_target else -y

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """Refused."""
        _refuse("nn.KLDivLoss", "Use nn.CrossEntropyLoss on logits with class probabilities as targets")


class NLLTerms(Terms):
    r"""Terms :math:`l_t = -w_{y_t} z_{t y_t}`: linear in the log-probabilities ``z``.

    Args:
        output: Log-probabilities.
        layout: Place of the class axis.
        labels: Class of each term, its weight, and which terms count.
        reduction: Of the user's loss.
    """

    def __init__(self, output: Tensor, layout: Layout, labels: Labels, reduction: str) -> None:
        super().__init__(output, layout, labels.mask & (labels.weight != 0), labels.weight.sum(), reduction)
        self._labels = labels

    def values(self) -> Tensor:
        """``l_t (N, R)``."""
        log_p = self.rows(widen(self.output)).gather(-1, self._labels.index.unsqueeze(-1)).squeeze(-1)
        return -self._labels.weight * log_p

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """``-w_y e_y``."""
        rows = torch.zeros(self.shape, dtype=self.total.dtype, device=self.total.device)
        return self.as_output(rows.scatter(-1, self._labels.index.unsqueeze(-1), -self._labels.weight.unsqueeze(-1)))

    def hessian_product(self, v: Tensor) -> Tensor:
        """Refused."""
        self._refuse()

    def sqrt_column(self, c: int) -> Tensor:
        """Refused."""
        self._refuse()

    def sample(self, generator: torch.Generator) -> Tensor:
        """Refused."""
        self._refuse()

    def information(self) -> Terms:
        """Of the distribution whose logarithms the outputs are."""
        return NLLInformation(self)

    def _refuse(self) -> NoReturn:
        _refuse(
            "nn.NLLLoss",
            "Use curvature.fisher, nn.CrossEntropyLoss on logits, which is the same loss with the log-softmax inside",
        )


class NLLInformation(NLLTerms):
    r"""The Fisher information of log-probabilities, :math:`w_{y_t} \operatorname{diag} e^{z_t}`.

    Behind a log-softmax it is that of a cross-entropy on logits. A sample is :math:`-\sqrt{w_{y_t}}\, e_{\hat y}`.

    Raises:
        NoLikelihoodError: If a term's outputs are no logarithms of probabilities.
    """

    hessian_is_fisher = True

    def __init__(self, terms: NLLTerms) -> None:
        vars(self).update(vars(terms))
        with torch.no_grad():
            log_p = self.rows(widen(self.output.detach()))
            off = torch.where(self.mask, log_p.logsumexp(-1), 0.0).abs().max()
            # Rounding of a sum of C numbers, in the precision of the model.
            if not off <= 1e2 * torch.finfo(self.output.dtype).eps ** 0.75:
                raise NoLikelihoodError(
                    "the outputs under nn.NLLLoss are no log-probabilities: the logarithm of their sum is up to "
                    f"{off.item():.3g} away from 0. End the model with nn.LogSoftmax, or use nn.CrossEntropyLoss on "
                    "logits."
                )
            self._weighted = torch.where(self.mask, self._labels.weight, 0.0).unsqueeze(-1) * log_p.exp()

    @torch.no_grad()
    def hessian_product(self, v: Tensor) -> Tensor:
        """``w p * v``."""
        return self.unrows(self._weighted * self.rows(v)).to(v.dtype)

    @torch.no_grad()
    def sqrt_column(self, c: int) -> Tensor:
        """``sqrt(w p_c) e_c``."""
        column = torch.zeros_like(self._weighted)
        column[..., c] = self._weighted[..., c].sqrt()
        return self.as_output(column)

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """``-sqrt(w) e_y`` with labels ``y`` drawn from the model."""
        p = self.rows(widen(self.output.detach())).exp()
        drawn = drawn_classes(p, generator)
        rows = torch.zeros_like(p).scatter(-1, drawn, -self._labels.weight.sqrt().unsqueeze(-1).to(p))
        return self.as_output(torch.where(self.mask.unsqueeze(-1), rows, 0.0))


@register_loss(nn.NLLLoss)
class NLL(Loss):
    """``nn.NLLLoss`` on log-probabilities, with class weights and ``ignore_index``; no curvature, but a Fisher."""

    zero_when_perfect = True

    def terms(
        self,
        output: Tensor,
        target: Tensor,
        *extra: Tensor,
        class_dim: int | None = None,
        mask: Tensor | None = None,
        as_called: bool = False,
        check: bool = False,
    ) -> NLLTerms:
        """See :meth:`Loss.terms`."""
        self.refuse_extra(extra)
        if target.is_floating_point():
            raise ValueError(f"nn.NLLLoss takes class indices, got a target of dtype {target.dtype}.")
        layout = class_layout(output, target, class_dim, as_called)
        refuse_one_class(self, layout)
        valid = layout.valid(mask, output.device)
        weight = class_weights(self.loss_fn.weight, layout.shape[2], widen(output.new_empty(0)), check)
        labels = read_labels(target, layout, valid, weight, self.loss_fn.ignore_index, check)
        return NLLTerms(output, layout, labels, self.reduction)
