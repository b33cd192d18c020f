"""Losses that treat every entry of the output alone: their Hessian is diagonal."""

from __future__ import annotations

import copy
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from curvature.losses.errors import EMPIRICAL, NoCurvatureError
from curvature.losses.loss import Loss
from curvature.losses.terms import Layout, Terms, noise
from solvers.precision import widen


class ElementwiseLoss(Loss):
    r"""A loss :math:`l_t = \sum_c \ell(z_{tc}; y_{tc})`, given by three functions of one entry.

    Subclasses write :meth:`value`, :meth:`slope` and :meth:`curvature` on tensors of the output's shape, in float32 at
    least. Terms lie along the last axis (an output ``(N,)`` has one output per example); a mean loss divides by the
    number of entries. Targets must have the output's shape: nothing is broadcast.

    Attributes:
        convex: Whether the curvature is never negative for the targets that :meth:`check_values` lets pass. If not
            known, it is looked at before a root is taken, which waits for the device.
    """

    convex: bool = False
    #: Whether the loss is a negative log-likelihood whose Hessian is not its Fisher information, so that
    #: :meth:`information` and :meth:`score` are written.
    likelihood: bool = False
    #: See :class:`Terms`.
    without_likelihood: str = Terms.without_likelihood

    @property
    def hessian_is_fisher(self) -> bool:
        """See :class:`Terms`."""
        return False

    @abstractmethod
    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        r""":math:`\ell(z; y)`, differentiable in ``z``."""

    @abstractmethod
    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        r""":math:`\partial \ell / \partial z`."""

    @abstractmethod
    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        r""":math:`\partial^2 \ell / \partial z^2`; raises NoCurvatureError for losses without curvature."""

    def draw(self, z: Tensor, y: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """A draw per entry with mean zero and variance :meth:`curvature`; normal unless overridden."""
        normal = noise(z.shape, z, generator).normal_(generator=generator).to(z.device)
        return self.curvature(z, y, *extra).sqrt() * normal

    def information(self, z: Tensor, *extra: Tensor) -> Tensor:
        """The Fisher information of an entry, where :attr:`likelihood`; see :meth:`Terms.fisher`."""
        raise NotImplementedError

    def score(self, z: Tensor, *extra: Tensor, generator: torch.Generator) -> Tensor:
        """:meth:`slope` at an outcome drawn from the model, where :attr:`likelihood`; weighted by its root."""
        raise NotImplementedError

    def weight_of(self, z: Tensor) -> Tensor | None:
        """The weight of every entry, of the output's shape; ``None`` without an option that gives one."""
        return None

    def total(self, mask: Tensor, outputs: int) -> Tensor:
        """Divisor of a mean loss, for a mask ``(N, R)`` of terms with ``outputs`` outputs each."""
        return mask.sum() * outputs

    def prepare(self, output: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """Further arguments of the loss, checked and in the output's shape and dtype (float32 at least)."""
        self.refuse_extra(extra)
        return ()

    def check_values(self, output: Tensor, target: Tensor, *extra: Tensor) -> None:
        """Refuse values outside the loss's domain. May wait for the device."""

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
        if output.numel() == 0:
            raise ValueError(
                f"The output has shape {tuple(output.shape)}: there is no example in it. Skip empty batches."
            )
        if target.shape != output.shape:
            raise ValueError(
                f"{type(self.loss_fn).__name__} compares entry by entry: the target must have the output's shape "
                f"{tuple(output.shape)}, got {tuple(target.shape)}. Reshape one of them (PyTorch would broadcast, "
                "which compares every output with every target)."
            )
        layout = entry_layout(output, class_dim)
        valid = layout.valid(mask, output.device)
        if check:
            self.check_values(output.detach(), target, *extra)
        y = widen(target.detach()).to(widen(output.new_empty(0)))
        terms = ElementwiseTerms(self, output, y, self.prepare(output, *extra), layout, valid)
        weight = self.weight_of(output)
        return terms if weight is None else terms.only((terms.rows(weight) != 0).any(-1))


class ElementwiseTerms(Terms):
    """Terms of an :class:`ElementwiseLoss`: ``H_t`` and ``S_t`` are diagonal.

    Args:
        loss: Value and derivatives of one entry.
        output: The model's output.
        target: Of the output's shape.
        extra: Further arguments of the loss, of the output's shape.
        layout: Axes of one term.
        mask: ``(N, R)``.
    """

    def __init__(
        self,
        loss: ElementwiseLoss,
        output: Tensor,
        target: Tensor,
        extra: tuple[Tensor, ...],
        layout: Layout,
        mask: Tensor,
    ) -> None:
        total = loss.total(mask, layout.shape[2]).to(target.dtype)
        super().__init__(output, layout, mask, total, loss.reduction)
        self.hessian_is_fisher = loss.hessian_is_fisher
        self.without_likelihood = loss.without_likelihood
        self._loss = loss
        self._given = (target, *extra)

    @property
    def loss_name(self) -> str:
        return repr(self._loss.loss_fn)

    def along(self, class_dim: int) -> ElementwiseTerms:
        """The same entries, of which those along another axis belong to one term."""
        other = copy.copy(self)
        other.layout = Layout(self.layout.output_shape, (class_dim,))
        other.mask = other.rows(self.unrows(self.mask.unsqueeze(-1).expand(self.shape))).any(-1)
        return other

    def indefinite(self) -> bool:
        return not self._loss.convex and not self.hessian_is_fisher and bool((self._curvature < 0).any())

    def information(self) -> Terms | None:
        known = self.hessian_is_fisher or not self._loss.likelihood
        return super().information() if known else ElementwiseInformation(self)

    def values(self) -> Tensor:
        """``l_t (N, R)``."""
        return self.rows(self._loss.value(widen(self.output), *self._given)).sum(-1)

    def beyond_output(self) -> Tensor | None:
        """The value with the output held fixed, if it still has a graph."""
        value = self._loss.value(self._z, *self._given).sum()
        return value if value.requires_grad else None

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Slope of every entry."""
        return self.masked(self._loss.slope(self._z, *self._given)).to(self.output.dtype)

    @torch.no_grad()
    def hessian_product(self, v: Tensor) -> Tensor:
        """Curvature of every entry times ``v``."""
        self.rows(v)  # refuses another shape, which would be broadcast
        return (self._curvature * v).to(v.dtype)

    @torch.no_grad()
    def sqrt_column(self, c: int) -> Tensor:
        """The root of the curvature of output ``c``, zero for the others."""
        self._refuse_indefinite()
        column = torch.zeros(self.shape, dtype=self._curvature.dtype, device=self._curvature.device)
        column[..., c] = self.rows(self._curvature)[..., c].sqrt()
        return self.as_output(column)

    @torch.no_grad()
    def sqrt_product(self, x: Tensor) -> Tensor:
        """The root of the curvature of every entry times ``x``."""
        self._refuse_indefinite()
        return self.unrows(self.rows(self._curvature).sqrt() * x).to(x.dtype)

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """A draw per entry."""
        self._refuse_indefinite()
        return self.masked(self._loss.draw(self._z, *self._given, generator=generator)).to(self.output.dtype)

    @property
    def _z(self) -> Tensor:
        return widen(self.output.detach())

    @cached_property
    def _curvature(self) -> Tensor:
        with torch.no_grad():
            return self.masked(self._loss.curvature(self._z, *self._given))

    def _refuse_indefinite(self) -> None:
        if not self._loss.convex and not (self._curvature >= 0).all():
            raise NoCurvatureError(
                f"{self._loss!r} has a negative or undefined second derivative (smallest: "
                f"{self._curvature.min().item():.3g}) at this output, so its Gauss-Newton matrix is not positive "
                "semi-definite and has no root and no samples. Its products (hessian_product) are exact; "
                f"{EMPIRICAL} works."
            )


class ElementwiseInformation(ElementwiseTerms):
    """:class:`ElementwiseTerms` with the Fisher information of every entry in the place of its curvature."""

    def __init__(self, terms: ElementwiseTerms) -> None:
        vars(self).update(vars(terms))
        vars(self).pop("_curvature", None)
        self.hessian_is_fisher = True

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """A score per entry."""
        drawn = self._loss.score(self._z, *self._given[1:], generator=generator)
        return self.masked(drawn).to(self.output.dtype)

    @cached_property
    def _curvature(self) -> Tensor:
        with torch.no_grad():
            return self.masked(self._loss.information(self._z, *self._given[1:]))


def entry_layout(output: Tensor, class_dim: int | None) -> Layout:
    """Terms along the last axis, or along another one."""
    rank = output.ndim
    if class_dim is None:
        return Layout(output.shape, (rank - 1,) if rank > 1 else ())
    return Layout.along(output.shape, class_dim)
