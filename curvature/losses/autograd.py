"""Any twice-differentiable loss, by automatic differentiation with respect to the output.

Axis letters: ``T = N R`` terms, ``C`` outputs of one term.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from curvature.losses.errors import EMPIRICAL, NoCurvatureError, NonFiniteLossError, UnknownLossError
from curvature.losses.loss import Loss, loss_for
from curvature.losses.terms import Layout, Terms, noise
from solvers.outcome.finite import is_finite
from solvers.outcome.memory import is_out_of_memory
from solvers.precision import widen


class AutogradLoss(Loss):
    r"""A loss written by the user, as a sum or mean of per-example losses.

    The loss of one term is that of a batch that holds this term alone. Terms are the examples;
    with ``class_dim`` they are the positions, and ``loss_fn`` is called on outputs ``(1, C)``.

    Prefer a registered loss where there is one: values, gradients and Hessian products cost about two and four calls of
    ``loss_fn``, but roots and samples take the eigenvalues of a ``C x C`` matrix per term, ``O(T C^3)`` time and
    ``O(T C^2)`` memory, in float64, and wait for the device.

    Args:
        loss_fn: ``loss_fn(output, target, *extra)``, a scalar or one number per example (or more), without randomness.
        reduction: How ``loss_fn`` joins examples: ``"mean"``, ``"sum"``, or ``"none"`` if it returns them separately.
            None: read from ``loss_fn.reduction``.
        max_entries: Largest ``T C^2`` for which roots are formed.

    Raises:
        ValueError: If the reduction is missing and cannot be found.

    Example:
        >>> import torch
        >>> from curvature.losses import AutogradLoss
        >>> def focal(output, target):  # (1 - p_y)^2 times the cross-entropy
        ...     log_p = output.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        ...     return (-((1 - log_p.exp()) ** 2) * log_p).mean()
        >>> terms = AutogradLoss(focal, reduction="mean").terms(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
        >>> terms.hessian_product(torch.ones(4, 3)).abs().max() < 1e-6  # the softmax ignores a common shift
        tensor(True)
    """

    def __init__(
        self, loss_fn: Callable[..., Tensor], *, reduction: str | None = None, max_entries: int = 2**27
    ) -> None:
        super().__init__(loss_fn)
        self._reduction, self._sums = reduction, False
        self._max_entries = max_entries
        if reduction is None and not _says(loss_fn):
            raise ValueError(
                f"How does {loss_fn!r} join the examples of a batch? It has no attribute 'reduction': pass "
                "reduction='mean', 'sum' or 'none' (it returns one number per example)."
            )

    @classmethod
    def compared(cls, loss_fn: Callable[..., Tensor]) -> Self:
        """One that finds out how ``loss_fn`` joins examples: it compares the first batch with its terms one by one."""
        loss = cls(loss_fn, reduction=None if _says(loss_fn) else "mean")
        loss._reduction = None
        return loss

    @property
    def open(self) -> bool:
        """Whether the reduction is not known before a first batch."""
        return self._reduction is None and not _says(self.loss_fn)

    @property
    def reduction(self) -> str:
        """As given, as ``loss_fn`` says, or as found; ``"sum"`` where :meth:`summed` made it one."""
        return "sum" if self._sums else self._joins

    @property
    def _joins(self) -> str:
        """How ``loss_fn`` joins the examples it is called on."""
        return self.check_reduction(self.loss_fn.reduction if self._reduction is None else self._reduction)

    def summed(self) -> Self:
        """The sum of the same terms, which are taken one by one, however ``loss_fn`` joins them."""
        other = copy.copy(self)
        other._sums = True
        return other

    def terms(
        self,
        output: Tensor,
        target: Tensor,
        *extra: Tensor,
        class_dim: int | None = None,
        mask: Tensor | None = None,
        as_called: bool = False,
        check: bool = False,
    ) -> AutogradTerms:
        """See :meth:`Loss.terms`; targets and further arguments have one entry per term along their first axes.

        With ``check``, a batch without mask must equal the sum of its terms one by one.

        Raises:
            UnknownLossError: Where the reduction is to be found, if the batch does not tell it.
        """
        if output.numel() == 0 or output.ndim == 0:
            raise ValueError(f"The output has shape {tuple(output.shape)}: there is no example. Skip empty batches.")
        if class_dim is None:
            layout = Layout(output.shape, tuple(range(1, output.ndim)))
        else:
            layout = Layout.along(output.shape, class_dim)
        per_term = len(layout.term_shape)
        for x in (target, *extra):
            if x.shape[:per_term] != layout.term_shape:
                raise ValueError(
                    f"{self!r} is evaluated term by term: target and further arguments must have the shape "
                    f"{layout.term_shape} of the terms along their first axes, got {tuple(x.shape)}."
                )
        given = tuple(x.detach().flatten(0, per_term - 1) for x in (target, *extra))
        valid = layout.valid(mask, output.device)
        if self.open:
            z = AutogradTerms(self.loss_fn, output, given, layout, valid, "none", self._max_entries).batch(output)
            counted = valid.flatten()
            self._reduction = _found(self.loss_fn, z.detach()[counted], *(x[counted] for x in given))
        terms = AutogradTerms(self.loss_fn, output, given, layout, valid, self.reduction, self._max_entries)
        if check and mask is None:
            self._check_sum(terms, given)
        return terms

    def _check_sum(self, terms: AutogradTerms, given: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            together = self.loss_fn(terms.batch(terms.output), *given)
            one_by_one = terms.value() / (terms.total if self._joins == "mean" else 1)
        if self._joins != "none" and together.ndim > 0:
            raise ValueError(
                f"{self!r} returned a tensor of shape {tuple(together.shape)}: with reduction={self._joins!r} it "
                "must return a scalar. Pass reduction='none'."
            )
        tolerance = 1e3 * torch.finfo(terms.output.dtype).eps
        if not torch.allclose(together.sum().to(one_by_one), one_by_one, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"{self!r} is not the {self._joins!r} of its terms: the whole batch gives {together.sum().item()}, "
                f"its {terms.mask.numel()} terms one by one {one_by_one.item()}. (a) The reduction may be another one "
                "than was said. (b) Examples may interact (contrastive losses) or be weighted by the batch (masks, "
                "class weights): such a loss has no terms."
            )


class AutogradTerms(Terms):
    """Terms of an :class:`AutogradLoss`.

    Args:
        loss_fn: The user's loss.
        output: The model's output.
        given: Target and further arguments of the loss, terms along the first axis ``(T, ...)``.
        layout: Axes of one term.
        mask: ``(N, R)``.
        reduction: Of the user's loss.
        max_entries: Largest size of a root.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        output: Tensor,
        given: tuple[Tensor, ...],
        layout: Layout,
        mask: Tensor,
        reduction: str,
        max_entries: int,
    ) -> None:
        super().__init__(output, layout, mask, mask.sum().to(widen(output.new_empty(0))), reduction)
        self._loss_fn = loss_fn
        self._given = given
        self._max_entries = max_entries

    def batch(self, x: Tensor) -> Tensor:
        """Output-shaped to ``(T, *class_shape)``, as the loss takes it, in float32 at least."""
        return widen(self.rows(x).reshape((-1, *self.layout.class_shape)))

    def values(self) -> Tensor:
        """``l_t (N, R)``."""
        return _each(self._one, self.batch(self.output), *self._given).reshape(self.mask.shape)

    def beyond_output(self) -> Tensor | None:
        """The value with the output held fixed, if it still has a graph."""
        value = self._loss_fn(self._z, *self._given).sum()
        return value if value.requires_grad else None

    def gradient(self) -> Tensor:
        """By one reverse pass through the loss."""
        return self._masked_out(_each(grad(self._one), self._z, *self._given)).to(self.output.dtype)

    def hessian_product(self, v: Tensor) -> Tensor:
        """By reverse over reverse; one pass per leading entry of ``v``."""

        def product(z: Tensor, direction: Tensor, *given: Tensor) -> Tensor:
            return grad(lambda z: (grad(self._one)(z, *given) * direction).sum())(z)

        lead = self.rows(v).shape[:-3]
        with _differentiable(self._loss_fn):
            products = [
                self._masked_out(_each(product, self._z, self.batch(direction), *self._given))
                for direction in v.detach().reshape((-1, *self.output.shape))
            ]
        return torch.stack(products).reshape((*lead, *self.output.shape)).to(v.dtype)

    def indefinite(self) -> bool:
        """By eigenvalues where they are cheap, else by random directions, which may miss it."""
        if self.mask.numel() * self.shape[2] ** 2 <= 2**20:
            values = torch.linalg.eigvalsh(self._hessians())
            return bool(values.min() < -self._rounding(values))
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            v = torch.randn(self.output.shape, generator=generator, dtype=torch.float64).to(self.output.detach())
            bend = self.rows(self.hessian_product(v) * v)
            if bool((bend.sum(-1) < -(torch.finfo(v.dtype).eps ** 0.5) * bend.abs().sum(-1)).any()):
                return True
        return False

    @property
    def loss_name(self) -> str:
        return repr(self._loss_fn)

    def sqrt_column(self, c: int) -> Tensor:
        """Eigenvector ``c`` of every Hessian, times the root of its eigenvalue."""
        return self.as_output(self._root[..., c])

    def sample(self, generator: torch.Generator) -> Tensor:
        """Normal with covariance ``H_t``."""
        normal = noise(self.shape, self._root, generator).normal_(generator=generator).to(self._root.device)
        return self.as_output(torch.einsum("nrij,nrj->nri", self._root, normal))

    @cached_property
    def _root(self) -> Tensor:
        """``S (N, R, C, C)`` in float64, zero outside the mask."""
        N, R, C = self.shape
        if N * R * C**2 > self._max_entries:
            raise NoCurvatureError(
                f"A root of the Hessian of {self._loss_fn!r} takes a {C} x {C} matrix for each of {N * R} terms, "
                f"{N * R * C**2:.2g} numbers; the limit is {self._max_entries:.2g}. Use hessian_product, "
                f"{EMPIRICAL}, smaller batches, class_dim= if positions are independent terms, or raise "
                "max_entries."
            )
        H = self._hessians()
        if not is_finite(H):
            self.refuse_undefined()
        values, vectors = torch.linalg.eigh(H)
        largest, smallest = values.abs().max(), values.min()
        if largest == 0:
            raise NoCurvatureError(
                f"The Hessian of {self._loss_fn!r} is zero for every term: the loss is linear in the output here, and "
                f"a Gauss-Newton matrix would be zero too. Use {EMPIRICAL}, which needs gradients only."
            )
        if not smallest >= -self._rounding(values):  # catches NaN as well
            raise NoCurvatureError(
                f"The Hessian of {self._loss_fn!r} with respect to the output is indefinite (eigenvalues from "
                f"{smallest.item():.3g} to {largest.item():.3g}), so its Gauss-Newton matrix is not positive "
                "semi-definite and has no root and no samples. Its products (hessian_product) are exact; "
                f"{EMPIRICAL} works."
            )
        return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)

    def _hessians(self) -> Tensor:
        """``H_t (N, R, C, C)`` in float64, zero outside the mask."""
        N, R, C = self.shape
        with _differentiable(self._loss_fn):
            H = _each(jacrev(grad(self._one)), self._z, *self._given).reshape(N, R, C, C)
        H = torch.where(self.mask[..., None, None], H, 0.0)
        return 0.5 * (H + H.mT).double()

    def _rounding(self, values: Tensor) -> Tensor:
        """Size of the eigenvalues that rounding leaves where there should be zeros."""
        return 10 * self.shape[2] * torch.finfo(self._z.dtype).eps * values.abs().max()

    @property
    def _z(self) -> Tensor:
        return self.batch(self.output.detach())

    def _one(self, z: Tensor, *given: Tensor) -> Tensor:
        """The loss of one term: of a batch that holds it alone."""
        return self._loss_fn(z.unsqueeze(0), *(x.unsqueeze(0) for x in given)).sum()

    def _masked_out(self, x: Tensor) -> Tensor:
        """``(T, *class_shape)`` to output-shaped, zero outside the mask."""
        return self.unrows(torch.where(self.mask.unsqueeze(-1), x.detach().reshape(self.shape), 0.0))


@contextlib.contextmanager
def _differentiable(loss_fn: Any) -> Iterator[None]:
    """Say in words that a loss has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise NoCurvatureError(
            f"PyTorch can differentiate {loss_fn!r} only once ({error}). Write it in plain torch operations, or use "
            f"{EMPIRICAL}, which needs gradients only."
        ) from error


def loss_over_data(loss_fn: Any) -> Loss:
    """The :class:`Loss` for a loss over a data set, whose first pass compares each batch with its terms.

    There, a function or module of unknown type that compares an output with a target is taken term by term, by
    autograd. If it does not say how it joins examples, the first batch tells.

    Raises:
        UnknownLossError: If it takes other arguments.
    """
    try:
        return loss_for(loss_fn)
    except UnknownLossError:
        if callable(loss_fn) and _takes_two(loss_fn):
            return AutogradLoss.compared(loss_fn)
        raise


def _says(loss_fn: Any) -> bool:
    """Whether a loss says how it joins examples."""
    return isinstance(getattr(loss_fn, "reduction", None), str)


def _takes_two(loss_fn: Any) -> bool:
    """Whether a loss can be called with an output and a target alone."""
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # of a function that does not tell
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _found(loss_fn: Any, *batch: Tensor) -> str:
    """How a loss joins the examples of a batch, from its values on all of them and on each.

    Raises:
        UnknownLossError: If the values do not tell.
        NonFiniteLossError: If the loss of the batch is infinite or not a number.
    """
    with torch.no_grad():
        whole = loss_fn(*batch)
        if not isinstance(whole, Tensor):
            raise TypeError(f"the loss {loss_fn!r} returned a {type(whole).__name__}, not a tensor.")
        if whole.numel() != 1:
            return "none"
        try:
            if len(batch[0]) == 1:
                batch = tuple(torch.cat([x, x]) for x in batch)
                whole = loss_fn(*batch)  # a sum is twice the mean
            values = _each(lambda *one: loss_fn(*(x.unsqueeze(0) for x in one)).sum(), *batch).double()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise UnknownLossError(
                f"No derivatives are known for the loss {loss_fn!r}, and it cannot be taken example by example: on "
                f"another number of them it raises {type(error).__name__} ({error}). Let it depend on its arguments "
                "alone; curvature.hessian on one batch takes it as it is."
            ) from error
    number = len(batch[0])
    whole, total, size = whole.double().reshape(()), values.sum(), values.abs().sum()
    if not bool(torch.isfinite(whole)):
        raise NonFiniteLossError(
            f"The loss is {whole.item()} for an output of shape {tuple(batch[0].shape)}, first at example "
            f"{int(torch.nonzero(~torch.isfinite(values))[:1].sum())}. Look for NaN or infinity in data and parameters."
        )
    eps = torch.finfo(batch[0].dtype).eps
    off = {"mean": (whole - total / number).abs(), "sum": (whole - total).abs()}
    found = min(off, key=lambda name: float(off[name]))
    say = "Say it: curvature.losses.AutogradLoss(loss_fn, reduction='mean') or 'sum'."
    if not bool(off[found] <= 1e3 * eps * (1 + whole.abs())):
        raise UnknownLossError(
            f"No derivatives are known for the loss {loss_fn!r}, and on {number} examples it is {whole.item():.6g}: "
            f"neither the mean nor the sum of its values on each, {total.item() / number:.6g} and {total.item():.6g}. "
            "Examples may interact (contrastive losses) or be weighted by the batch (ignored targets, class weights): "
            "such a loss has no terms, only curvature.hessian on one batch takes it. Positions that are terms of their "
            "own need class_dim=."
        )
    if not bool((total - total / number).abs() > 1e2 * (off[found] + eps * size)):
        raise UnknownLossError(
            f"The loss {loss_fn!r} does not say whether it is a mean or a sum over examples, and on the first batch, "
            f"where it is {whole.item():.3g}, both are the same. {say}"
        )
    return found


def _each(function: Callable[..., Any], *batches: Tensor) -> Tensor:
    """``function`` of every entry along the first axes, by ``vmap`` or, where that cannot trace it, one by one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # users need no warning about operations that vmap loops over
            result: Tensor = vmap(function)(*batches)
    except RuntimeError as error:  # data-dependent control flow, .item(), an operation without batching rule
        if is_out_of_memory(error):
            raise
        result = torch.stack([function(*entries) for entries in zip(*batches, strict=True)])
    return result
