"""Softmax cross-entropy on logits, with every option of ``nn.CrossEntropyLoss``."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from curvature.losses.classes import class_layout, class_weights, drawn_classes, read_labels, refuse_one_class
from curvature.losses.loss import Loss, register_loss
from curvature.losses.terms import Layout, Terms
from solvers.precision import widen


class CrossEntropyTerms(Terms):
    r"""Terms :math:`l_t = -\sum_c q_{tc} \log p_{tc}` with :math:`p_t = \operatorname{softmax}(z_t)`.

    With the mass :math:`m_t = \sum_c q_{tc}`, which weights and smoothing move away from one:

    .. math::
        \nabla l_t = m_t p_t - q_t, \qquad H_t = m_t (\operatorname{diag} p_t - p_t p_t^\top) = S_t S_t^\top, \qquad
        S_t e_c = \sqrt{m_t p_{tc}}\, (e_c - p_t).

    A sample is :math:`\sqrt{m_t}\, (p_t - e_{\hat y})` with :math:`\hat y \sim p_t`. Costs one softmax of the output,
    kept for all calls; no matrix per term.

    Args:
        output: Logits.
        layout: Place of the class axis.
        mask: ``(N, R)``.
        total: Divisor of the mean loss.
        reduction: Of the user's loss.
        spread: Part of ``q`` that has no single class, broadcastable to ``(N, R, C)``, or None.
        index: ``(N, R)`` the class that carries ``peak``, or None.
        peak: ``(N, R)`` weight of that class in ``q``, or None.

    References:
        Botev, Ritter and Barber (2017), https://arxiv.org/abs/1706.03662; Dangel, Kunstner and Hennig (2020), appendix
        A, https://arxiv.org/abs/1912.10985
    """

    hessian_is_fisher = True

    def __init__(
        self,
        output: Tensor,
        layout: Layout,
        mask: Tensor,
        total: Tensor,
        reduction: str,
        *,
        spread: Tensor | None,
        index: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> None:
        super().__init__(output, layout, mask, total, reduction)
        self._spread = spread
        self._index = index
        self._peak = peak

    def values(self) -> Tensor:
        """``l_t (N, R)``."""
        log_p = self.rows(widen(self.output)).log_softmax(-1)
        values = torch.zeros_like(log_p[..., 0])
        # Without smoothing only the target's entry is read, so that logits of -inf elsewhere are harmless.
        if self._index is not None and self._peak is not None:
            values = values - self._peak * log_p.gather(-1, self._index.unsqueeze(-1)).squeeze(-1)
        if self._spread is not None:
            values = values - (self._spread * log_p).sum(-1)
        return values

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """``m p - q``."""
        gradient = self.mass.unsqueeze(-1) * self._p
        if self._spread is not None:
            gradient = gradient - self._spread * self.mask.unsqueeze(-1)
        if self._index is not None and self._peak is not None:
            gradient = gradient.scatter_add(-1, self._index.unsqueeze(-1), -self._peak.unsqueeze(-1))
        return self.as_output(gradient)

    @torch.no_grad()
    def hessian_product(self, v: Tensor) -> Tensor:
        """``m (p * v - p <p, v>)``."""
        weighted = self._p * self.rows(v)
        product = self.mass.unsqueeze(-1) * (weighted - self._p * weighted.sum(-1, keepdim=True))
        return self.unrows(product).to(v.dtype)

    @torch.no_grad()
    def sqrt_column(self, c: int) -> Tensor:
        """``sqrt(m p_c) (e_c - p)``."""
        column = -self._p
        column[..., c] += 1
        return self.as_output((self.mass * self._p[..., c]).sqrt().unsqueeze(-1) * column)

    @property
    def rank(self) -> int:
        """C - 1: the Hessian of a softmax is singular."""
        return max(1, self.columns - 1)

    @torch.no_grad()
    def root(self, start: int, stop: int) -> Tensor:
        r"""Columns of :math:`S_t Q_t`, with the reflection :math:`Q_t` that turns the last column to zero.

        :math:`S_t` maps :math:`\sqrt{p_t}` to zero, and :math:`Q_t e_C = -\sqrt{p_t}`, so that
        :math:`S_t Q_t e_c = S_t e_c - \sqrt{p_{tc}} / (1 + \sqrt{p_{tC}})\, S_t e_C`.
        """
        if self.columns == 1:
            return self.sqrt_column(0).unsqueeze(0)
        x = self._p.new_zeros(stop - start, *self._p.shape)
        x.diagonal(start, 0, -1).fill_(1)
        x[..., -1] = -(self._p[..., start:stop].sqrt() / (1 + self._p[..., -1:].sqrt())).movedim(-1, 0)
        return self.sqrt_product(x).to(self.output.dtype)

    @torch.no_grad()
    def sqrt_product(self, x: Tensor) -> Tensor:
        """``r * x - p <r, x>`` with ``r = sqrt(m p)``."""
        weighted = (self.mass.unsqueeze(-1) * self._p).sqrt() * x
        return self.unrows(weighted - self._p * weighted.sum(-1, keepdim=True)).to(x.dtype)

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """``sqrt(m) (p - e_y)`` with labels ``y`` drawn from the model."""
        drawn = drawn_classes(self._p, generator)
        error = self._p.scatter_add(-1, drawn, torch.full_like(drawn, -1, dtype=self._p.dtype))
        return self.as_output(self.mass.sqrt().unsqueeze(-1) * error)

    @cached_property
    def _p(self) -> Tensor:
        """Probabilities ``(N, R, C)``, zero outside the mask: the model's outputs on padding are dropped here."""
        with torch.no_grad():
            p = self.rows(widen(self.output.detach())).softmax(-1)
            return p.masked_fill(~self.mask.unsqueeze(-1), 0)

    @cached_property
    def mass(self) -> Tensor:
        """``m (N, R)``, zero outside the mask."""
        mass = torch.zeros(self.mask.shape, dtype=self.total.dtype, device=self.total.device)
        if self._peak is not None:
            mass = mass + self._peak
        if self._spread is not None:
            mass = mass + self._spread.sum(-1)
        return torch.where(self.mask, mass, 0.0)


@register_loss(nn.CrossEntropyLoss)
class CrossEntropy(Loss):
    r"""``nn.CrossEntropyLoss``: class weights, label smoothing, ``ignore_index``, indices or probabilities as targets.

    With class weights ``w`` and label smoothing :math:`\epsilon`, a class index :math:`y` means
    :math:`q_c = (1 - \epsilon) w_y [c = y] + \epsilon w_c / C` and class probabilities :math:`y_c` mean
    :math:`q_c = w_c ((1 - \epsilon) y_c + \epsilon / C)`. A mean loss divides by :math:`\sum_t w_{y_t}` for indices
    and by the number of terms for probabilities, as PyTorch does.

    Outputs are ``(C,)``, ``(N, C)``, ``(N, C, d1, ...)`` as in PyTorch, or ``(N, d1, ..., C)`` with targets
    ``(N, d1, ...)``.
    """

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
    ) -> Terms:
        """See :meth:`Loss.terms`."""
        self.refuse_extra(extra)
        options: nn.CrossEntropyLoss = self.loss_fn
        layout = class_layout(output, target, class_dim, as_called)
        refuse_one_class(self, layout)
        classes, valid = layout.shape[2], layout.valid(mask, output.device)
        logits = widen(output.new_empty(0))  # dtype and device of the arithmetic
        weight, smoothing = class_weights(options.weight, classes, logits, check), options.label_smoothing
        if target.is_floating_point():
            q = weight * ((1 - smoothing) * layout.rows(target.detach()).to(logits) + smoothing / classes)
            if check and not (target >= 0).all():
                raise ValueError(f"Class probabilities must not be negative, got {target.min().item()}.")
            total = valid.sum().to(logits)
            terms = CrossEntropyTerms(output, layout, valid, total, self.reduction, spread=q)
        else:
            labels = read_labels(target, layout, valid, weight, options.ignore_index, check)
            terms = CrossEntropyTerms(
                output,
                layout,
                labels.mask,
                labels.weight.sum(),
                self.reduction,
                spread=weight * (smoothing / classes) if smoothing > 0 else None,
                index=labels.index,
                peak=(1 - smoothing) * labels.weight,
            )
        # A class of weight zero, or a target without classes, is one more way to leave a term out.
        return terms.only(terms.mass != 0) if options.weight is not None or target.is_floating_point() else terms
