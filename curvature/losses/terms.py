"""The loss of one batch as a sum of terms, and the arithmetic on the outputs of each term.

Axis letters: ``N`` examples, ``R`` positions of an example, ``C`` outputs of one term, ``...`` free leading axes.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvature.losses.errors import NoCurvatureError, NoLikelihoodError, NonFiniteCurvatureError, NonFiniteLossError


@dataclass(frozen=True)
class Layout:
    """Which axes of an output belong to one term of the loss.

    Args:
        output_shape: Shape of the model's output.
        class_axes: Axes that one term spans, ascending; the first of the remaining axes counts examples, the others
            count positions. Empty if every entry of a vector of outputs is an example with one output.
    """

    output_shape: torch.Size
    class_axes: tuple[int, ...]

    @classmethod
    def along(cls, output_shape: torch.Size, class_dim: int) -> Layout:
        """Terms along one axis.

        Raises:
            ValueError: If the output has no such axis, or it is the first, which counts examples.
        """
        rank = len(output_shape)
        if not -rank <= class_dim < rank or class_dim % rank == 0:
            axes = f"expected an axis from 1 to {rank - 1}" if rank > 1 else "it has no other; leave class_dim out"
            raise ValueError(
                f"class_dim={class_dim} is no axis of the outputs of one term for an output of shape "
                f"{tuple(output_shape)}, whose first axis counts examples: {axes}."
            )
        return cls(output_shape, (class_dim % rank,))

    @property
    def term_shape(self) -> tuple[int, ...]:
        """Shape of one number per term, in the order of the output's axes."""
        return tuple(size for axis, size in enumerate(self.output_shape) if axis not in self.class_axes)

    @property
    def class_shape(self) -> tuple[int, ...]:
        """Sizes of the class axes."""
        return tuple(self.output_shape[axis] for axis in self.class_axes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, R, C)``."""
        return (math.prod(self.term_shape[:1]), math.prod(self.term_shape[1:]), math.prod(self.class_shape))

    def rows(self, x: Tensor) -> Tensor:
        """``(..., *output_shape)`` to ``(..., N, R, C)``."""
        rank = len(self.output_shape)
        lead = x.shape[: x.ndim - rank]
        if x.shape[len(lead) :] != self.output_shape:
            raise ValueError(
                f"Expected a tensor of the output's shape {tuple(self.output_shape)}, with any leading axes, "
                f"got {tuple(x.shape)}."
            )
        return x.movedim(self._axes_from_end, self._last).reshape((*lead, *self.shape))

    def unrows(self, rows: Tensor) -> Tensor:
        """``(..., N, R, C)`` to ``(..., *output_shape)``; inverse of :meth:`rows`."""
        lead = rows.shape[:-3]
        if rows.shape[-3:] != self.shape:
            raise ValueError(f"Expected rows of shape (..., N, R, C) = (..., {self.shape}), got {tuple(rows.shape)}.")
        return rows.reshape((*lead, *self.term_shape, *self.class_shape)).movedim(self._last, self._axes_from_end)

    def valid(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """The mask ``(N, R)`` of the terms that count, from one of shape ``term_shape`` (None: all count)."""
        if mask is None:
            return torch.ones(self.shape[:2], dtype=torch.bool, device=device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True: the term counts), got {mask.dtype}. Pass mask.bool().")
        if mask.shape != self.term_shape:
            raise ValueError(
                f"mask must hold one entry per term, shape {self.term_shape} (the output {tuple(self.output_shape)} "
                f"without its class axis), got {tuple(mask.shape)}."
            )
        return mask.to(device).reshape(self.shape[:2])

    # Negative axes leave room for leading batch axes.
    @property
    def _axes_from_end(self) -> tuple[int, ...]:
        return tuple(axis - len(self.output_shape) for axis in self.class_axes)

    @property
    def _last(self) -> tuple[int, ...]:
        return tuple(range(-len(self.class_axes), 0))


class Terms(ABC):
    r"""The loss of one batch, written as a sum over terms.

    A term :math:`l_t` belongs to one example and one position and depends on the ``C`` outputs :math:`z_t` there:

    .. math:: L_\text{sum} = \sum_t l_t(z_t), \qquad L_\text{mean} = L_\text{sum} / \text{total}.

    Everything below is in the scale of :math:`L_\text{sum}`; divide by ``total`` for the mean loss. Terms outside the
    mask contribute zero everywhere. Matrices per term are formed only where the class says so, and only
    :meth:`value`, :meth:`check` and :attr:`empty` wait for the device.

    Attributes:
        output: The model's output as given (not detached), of any shape.
        layout: Which axes of the output belong to one term.
        mask: ``(N, R)`` bool, the terms that count.
        total: 0-d, divisor of a mean loss: the number of valid terms or entries, or the sum of their class weights.
        reduction: How the user's loss joins its terms: ``"mean"``, ``"sum"`` or ``"none"``.
        hessian_is_fisher: Whether ``H_t`` is the Fisher information of the outputs under the loss's likelihood
            (weights count as multiplicities of a term). False for losses that are not a negative log-likelihood in a
            natural parameter: their ``H_t`` depends on the target.
    """

    hessian_is_fisher: bool = False
    #: What to do where a Fisher information is asked for and there is none.
    without_likelihood: str = "Use curvature.ggn, whose matrix needs no likelihood, or kind='empirical'."

    def __init__(self, output: Tensor, layout: Layout, mask: Tensor, total: Tensor, reduction: str) -> None:
        self.output = output
        self.layout = layout
        self.mask = mask
        self.total = total
        self.reduction = reduction

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, R, C)``: examples, positions, outputs of one term."""
        return self.layout.shape

    @property
    def columns(self) -> int:
        """Number of columns of the square root ``S_t``."""
        return self.shape[2]

    def rows(self, x: Tensor) -> Tensor:
        """Output-shaped ``(..., *output.shape)`` to ``(..., N, R, C)``."""
        return self.layout.rows(x)

    def unrows(self, rows: Tensor) -> Tensor:
        """``(..., N, R, C)`` to output-shaped ``(..., *output.shape)``."""
        return self.layout.unrows(rows)

    def value(self) -> Tensor:
        """The sum of all valid terms, 0-d, in float32 at least, differentiable in the output.

        Raises:
            NonFiniteLossError: If the sum is infinite or not a number.
        """
        terms = torch.where(self.mask, self.values(), 0.0)
        total = terms.sum()
        if not torch.isfinite(total):
            where = torch.nonzero(~torch.isfinite(terms))
            n, r = where[0].tolist() if len(where) else (None, None)
            raise NonFiniteLossError(
                f"The loss is {total.item()} for an output of shape {tuple(self.output.shape)}: {len(where)} of "
                f"{terms.numel()} terms are not finite, first at example {n}, position {r}; the output holds "
                f"{int(torch.isnan(self.output).sum())} NaN and {int(torch.isinf(self.output).sum())} infinite "
                "entries. Lower the learning rate or exclude these terms with mask=."
            )
        return total

    def only(self, counts: Tensor) -> Terms:
        """The same terms, of which those count alone that did and are named; the divisor stays.

        Args:
            counts: Which, broadcastable to ``(N, R)``.
        """
        other = copy.copy(self)
        for name in [key for key in vars(other) if isinstance(getattr(type(other), key, None), cached_property)]:
            del vars(other)[name]  # of the other mask
        other.mask = self.mask & counts
        return other

    @property
    def empty(self) -> bool:
        """Whether no term counts: all targets are ignored, or of classes of weight zero. Waits for the device."""
        return bool(self.total == 0)

    def check(self) -> None:
        """Refuse data whose mean loss would be 0/0. Waits for the device.

        Raises:
            ValueError: If no term counts.
        """
        if not self.total > 0:
            raise ValueError(
                f"No term of the loss counts: {int(self.mask.sum())} of {self.mask.numel()} terms are valid and their "
                f"total weight is {self.total.item()}, so the mean loss is not defined. Check mask=, ignore_index and "
                "the class weights."
            )

    def beyond_output(self) -> Tensor | None:
        """The loss as a function of everything but the output; ``None`` where it depends on nothing else."""
        return None

    @abstractmethod
    def values(self) -> Tensor:
        """``l_t`` of shape ``(N, R)``; entries outside the mask are arbitrary."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """Derivative of the sum of all terms with respect to the output; output-shaped, detached."""

    @abstractmethod
    def hessian_product(self, v: Tensor) -> Tensor:
        """``H_t v_t`` term by term, for ``v (..., *output.shape)``; same shape and dtype as ``v``."""

    @abstractmethod
    def sqrt_column(self, c: int) -> Tensor:
        """Column ``c`` of the square root of every term, ``H_t = S_t S_t^T``; output-shaped."""

    @property
    def rank(self) -> int:
        """How many columns :meth:`root` has."""
        return self.columns

    def root(self, start: int, stop: int) -> Tensor:
        """Columns ``start:stop`` of a square root with as few columns as any, ``(stop - start, *output.shape)``."""
        return torch.stack([self.sqrt_column(c) for c in range(start, stop)])

    def sqrt_product(self, x: Tensor) -> Tensor:
        """``S_t x_t`` term by term, ``(..., N, R, columns)`` to output-shaped; normal x give covariance ``H_t``.

        Sums the columns; overridden where a closed form spares them.
        """
        lead = x.shape[:-3]
        total = x.new_zeros(*lead, *self.output.shape)
        for c in range(self.columns):
            weights = self.unrows(x[..., c].unsqueeze(-1).expand(*lead, *self.shape))
            total = torch.addcmul(total, weights, self.sqrt_column(c).to(x.dtype))
        return total

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """Output-shaped draw ``v``, independent between terms, with mean zero and ``E[v_t v_t^T] = H_t``."""

    def refuse_undefined(self) -> None:
        """Refuse a Hessian that is infinite or undefined at these outputs. Waits for the device.

        Raises:
            NonFiniteCurvatureError: Saying where.
        """
        try:
            product = self.hessian_product(torch.ones_like(self.output.detach()))
        except NoCurvatureError:
            return  # nobody gets anything from it
        off = ~torch.isfinite(self.rows(product)).all(-1)
        if bool(off.any()):
            n, r = torch.nonzero(off)[0].tolist()
            raise NonFiniteCurvatureError(
                f"The loss is finite, but the second derivative of {self.loss_name} in the model's outputs is not, at "
                f"{int(off.sum())} of {off.numel()} terms, first at example {n}, position {r}, where the outputs are "
                f"{[round(z, 6) for z in self.rows(self.output.detach())[n, r][:4].tolist()]}. A probability that is "
                "exactly 0 or 1, or a rate of 0, has none: let the model return logits (nn.BCEWithLogitsLoss) or "
                "log-rates (log_input=True), whose curvature is finite everywhere, or keep the outputs away from the "
                "border (clamp)."
            )

    def information(self) -> Terms | None:
        """See :meth:`fisher`; ``None`` where the loss is no likelihood."""
        return self if self.hessian_is_fisher else None

    def fisher(self, strict: bool = True) -> Terms:
        r"""The same terms with :math:`H_t` the Fisher information of the outputs in the place of the Hessian.

        .. math:: F_t = \mathbb{E}_{\hat y \sim p(\cdot | z_t)}\, \nabla l_t(z_t; \hat y) \nabla l_t(z_t; \hat y)^\top,
            \qquad p(y | z) \propto e^{-l(z; y)},

        where class weights and the like count as multiplicities of a term. For a loss in natural parameters that is
        the Hessian; for others it is not, and unlike it does not depend on the targets.

        Args:
            strict: Refuse a loss that is no likelihood; else it keeps its Hessian.

        Raises:
            NoLikelihoodError: If the loss is no likelihood, or the outputs are no parameters of its distribution.
        """
        found = self.information()
        if found is None and strict:
            raise NoLikelihoodError(
                f"{self.loss_name} is not known as a negative log-likelihood, so that the model defines no "
                "distribution of targets and its Fisher information, kind='exact' or 'mc', does not exist. "
                f"{self.without_likelihood}"
            )
        return self if found is None else found

    @property
    def loss_name(self) -> str:
        """The loss, for messages."""
        return type(self).__name__.removesuffix("Terms")

    def indefinite(self) -> bool:
        """Whether the Hessian of some term is known not to be positive semi-definite. May wait for the device."""
        return False

    def masked(self, x: Tensor) -> Tensor:
        """An output-shaped tensor, zero outside the mask."""
        return torch.where(self.unrows(self.mask.unsqueeze(-1).expand(self.shape)), x, 0.0)

    def as_output(self, rows: Tensor) -> Tensor:
        """Rows of a result, output-shaped and in the output's dtype."""
        return self.unrows(rows).to(self.output.dtype)


def noise(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uninitialised tensor to be filled from ``generator``, on the generator's device and in the dtype of ``like``."""
    return torch.empty(shape, dtype=like.dtype, device=generator.device)
