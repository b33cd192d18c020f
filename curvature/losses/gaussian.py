"""Normal negative log-likelihood with given variances."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from curvature.losses.elementwise import ElementwiseLoss
from curvature.losses.errors import NoCurvatureError
from curvature.losses.loss import register_loss
from curvature.losses.terms import Layout, Terms, noise
from solvers.precision import widen, working_dtype


class MeanVarianceTerms(Terms):
    r"""Normal log-likelihoods of which mean and variance are both outputs of the model.

    With the residual :math:`r = \mu - y` and the variance :math:`v`, bounded below by the loss's ``eps`` (through which
    gradients pass, as in PyTorch), the Hessian of an entry in :math:`(\mu, v)` and its Fisher information are

    .. math::
        H = \begin{pmatrix} 1/v & -r/v^2 \\ -r/v^2 & r^2/v^3 - 1/(2 v^2) \end{pmatrix}, \qquad
        F = \begin{pmatrix} 1/v & 0 \\ 0 & 1/(2 v^2) \end{pmatrix}.

    The first is indefinite, so only its products are there; the second serves everything.

    Args:
        loss: The loss, whose options are read.
        mean: The terms with the variance held fixed.
        output: Means and variances, ``(*shape, 2)``.
        target: Of the mean's shape.
    """

    def __init__(self, loss: GaussianNLL, mean: Terms, output: Tensor, target: Tensor) -> None:
        layout = Layout(output.shape, (*mean.layout.class_axes, output.dim() - 1))
        super().__init__(output, layout, mean.mask, mean.total, mean.reduction)
        self._loss, self._y = loss, target.to(widen(output.new_empty(0)))

    @property
    def loss_name(self) -> str:
        return repr(self._loss.loss_fn)

    def values(self) -> Tensor:
        """``l_t (N, R)``."""
        mean, var = widen(self.output).unbind(-1)
        var = var + (var.clamp(min=self._loss.loss_fn.eps) - var).detach()
        value = self._loss.value(mean, self._y, var)
        return self.rows(torch.stack([value, torch.zeros_like(value)], -1)).sum(-1)

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """``r / v`` and ``(1 - r^2 / v) / (2 v)``."""
        r, v = self._parts()
        return self._joined(r / v, 0.5 * (1 - r**2 / v) / v).to(self.output.dtype)

    @torch.no_grad()
    def hessian_product(self, v: Tensor) -> Tensor:
        """``H v``."""
        r, var = self._parts()
        self.rows(v)  # refuses another shape, which would be broadcast
        a, b = v.unbind(-1)
        mixed, last = -r / var**2, r**2 / var**3 - 0.5 / var**2
        return self._joined(a / var + mixed * b, mixed * a + last * b).to(v.dtype)

    def indefinite(self) -> bool:
        """Always: the determinant of an entry is :math:`-1 / (2 v^3)`."""
        return not self.hessian_is_fisher

    def sqrt_column(self, c: int) -> Tensor:
        """Refused."""
        self._refuse()

    def sample(self, generator: torch.Generator) -> Tensor:
        """Refused."""
        self._refuse()

    def information(self) -> Terms:
        """See :class:`MeanVarianceInformation`."""
        return MeanVarianceInformation(self)

    def _refuse(self) -> NoReturn:
        raise NoCurvatureError(
            "nn.GaussianNLLLoss is not convex in mean and variance together, so its Gauss-Newton matrix is indefinite "
            "(not positive semi-definite) and has no root and no samples. Use curvature.fisher, which is; pass "
            "var.detach() if the variance is to be held fixed."
        )

    def _parts(self) -> tuple[Tensor, Tensor]:
        mean, var = widen(self.output.detach()).unbind(-1)
        return mean - self._y, var.clamp(min=self._loss.loss_fn.eps)

    def _joined(self, mean: Tensor, var: Tensor) -> Tensor:
        return self.masked(torch.stack([mean, var], -1))


class MeanVarianceInformation(MeanVarianceTerms):
    r"""The Fisher information of means and variances, :math:`\operatorname{diag}(1/v, 1/(2 v^2))`."""

    hessian_is_fisher = True

    def __init__(self, terms: MeanVarianceTerms) -> None:
        vars(self).update(vars(terms))

    @torch.no_grad()
    def hessian_product(self, v: Tensor) -> Tensor:
        """``F v``."""
        self.rows(v)
        return (self._diagonal() * v).to(v.dtype)

    @torch.no_grad()
    def sqrt_column(self, c: int) -> Tensor:
        """The root of the information of output ``c``, zero for the others."""
        root = self.rows(self._diagonal().sqrt())
        column = torch.zeros_like(root)
        column[..., c] = root[..., c]
        return self.as_output(column)

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Gradients at targets drawn from the model."""
        _, var = self._parts()
        normal = noise(var.shape, var, generator).normal_(generator=generator).to(var.device)
        return self._joined(normal / var.sqrt(), 0.5 * (1 - normal**2) / var).to(self.output.dtype)

    def _diagonal(self) -> Tensor:
        _, var = self._parts()
        return self._joined(1 / var, 0.5 / var**2)


@register_loss(nn.GaussianNLLLoss)
class GaussianNLL(ElementwiseLoss):
    r"""``nn.GaussianNLLLoss`` as a function of the mean: :math:`\ell'' = 1 / \max(\sigma^2, \epsilon)`.

    The variance is the third argument, of the output's shape, with a last axis of size one, or without the last axis,
    and is held fixed. One that the model predicts is an output like the mean, see :class:`MeanVarianceTerms`; on data
    sets the model then returns the pair ``(mean, variance)``, or ``output=`` picks it.
    """

    convex = True
    hessian_is_fisher = True

    def evaluate(self, output: Any, *given: Any) -> Tensor:
        """See :meth:`Loss.evaluate`; ``output`` may be the pair of mean and variance."""
        if not self.reads(output):
            return super().evaluate(output, *given)
        mean, var = output
        return super().evaluate(mean, *given, var)

    def reads(self, result: Any) -> bool:
        """Whether a model returned mean and variance."""
        pair = isinstance(result, (tuple, list)) and len(result) == 2
        return pair and all(isinstance(part, Tensor) for part in result)

    def joined(self, result: Any) -> Tensor:
        """Mean and variance as one tensor, the last axis of which holds the pair."""
        mean, var = result
        with torch.enable_grad():  # they have a graph even under no_grad
            return torch.stack([mean, self._variance(mean, var).to(mean.dtype)], -1)

    def terms(  # of two outputs or of one
        self, output: Any, target: Tensor, *extra: Tensor, **options: Any
    ) -> Terms:
        """See :meth:`Loss.terms`; ``output`` may be the pair of mean and variance."""
        if self.reads(output):
            output, *rest = output
            extra = (*rest, *extra)
        predicted = len(extra) == 1 and isinstance(extra[0], Tensor) and extra[0].requires_grad
        if not predicted:
            return super().terms(output, target, *extra, **options)
        inner = super().terms(output, target, extra[0].detach(), **options)  # checks shapes and values
        return MeanVarianceTerms(self, inner, self.joined((output, extra[0])), target.detach())

    def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``(log var + (z - y)^2 / var) / 2``."""
        (var,) = extra
        value = 0.5 * (var.log() + (z - y) ** 2 / var)
        return value + 0.5 * math.log(2 * math.pi) if self.loss_fn.full else value

    def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``(z - y) / var``."""
        return (z - y) / extra[0]

    def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        """``1 / var``."""
        return 1 / extra[0]

    def prepare(self, output: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """The variance in the output's shape, bounded below by the loss's ``eps``."""
        if len(extra) != 1:
            raise TypeError(
                f"nn.GaussianNLLLoss takes output, target and variance, got {2 + len(extra)} arguments. Pass the "
                "variance as the third."
            )
        return (self._variance(output, extra[0]).clamp(min=self.loss_fn.eps),)

    @staticmethod
    def _variance(output: Tensor, given: Any) -> Tensor:
        """The variance in the output's shape."""
        dtype = working_dtype(output)
        var = torch.as_tensor(given, dtype=dtype, device=output.device)  # PyTorch takes a float as well
        if var.shape == output.shape[:-1] and var.shape != output.shape:
            var = var.unsqueeze(-1)
        elif var.shape != output.shape and var.shape != (*output.shape[:-1], 1) and var.ndim > 0:
            raise ValueError(
                f"The variance must have the output's shape {tuple(output.shape)}, a last axis of size one, or no last "
                f"axis, got {tuple(var.shape)}."
            )
        return var.expand(output.shape)

    def check_values(self, output: Tensor, target: Tensor, *extra: Tensor) -> None:
        """Variances not negative."""
        for var in extra:
            if not (torch.as_tensor(var) >= 0).all():
                raise ValueError(f"Variances must not be negative, got {torch.as_tensor(var).min().item()}.")
