"""Derivatives of a network along directions of its input, by forward mode alone, for residuals of equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode

from curvature.residuals.jets import nested, second_order
from solvers.outcome.arguments import whole

Field = Callable[[Tensor], Tensor]


def directional_derivatives(u: Field, x: Tensor, v: Tensor, order: int = 2) -> tuple[Tensor, ...]:
    r"""A function and its derivatives along a direction.

    .. math:: \partial_t^k\, u(x + t v) \text{ at } t = 0, \qquad k = 0, \dots, \text{order}

    In one forward pass of all orders (:mod:`curvature.residuals.jets`) up to the second, where the operations of ``u``
    are known, and by forward mode nested ``order`` times otherwise; by reverse mode where torch's derivative of a
    forward derivative is wrong (of layer norm, ``torch.linalg.solve`` and determinants). Within a
    :class:`~precond.PointwiseResidual`, whose Jacobian is a reverse pass over all this, that is many times cheaper than
    ``torch.func.hessian`` or nested ``torch.func.grad``.

    >>> x, v = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])
    >>> [d.item() for d in directional_derivatives(lambda p: p[0] ** 3 * p[1], x, v, order=3)]
    [8.0, 12.0, 12.0, 6.0]

    Args:
        u: The function of one point.
        x: The point ``(d,)``.
        v: The direction ``(d,)``.
        order: Of the highest derivative, at least 1.

    Returns:
        ``order + 1`` tensors of the shape of ``u(x)``.
    """
    whole("order", order)
    parts = second_order(u, x, v.unsqueeze(0)) if order <= 2 else None
    if parts is not None:
        return tuple(parts[: order + 1])
    nested()
    try:
        with _TrustedForward():
            return _series(u, v, order, _forward)(x)
    except _WrongForwardError:
        return _series(u, v, order, _reverse)(x)


def laplacian(u: Field, x: Tensor) -> Tensor:
    r"""The sum of the pure second derivatives, :math:`\sum_i \partial^2 u / \partial x_i^2`.

    In one forward pass that carries the sum, or by forward mode with all axes in one batch; see
    :func:`directional_derivatives`.

    >>> laplacian(lambda p: p.square().sum(), torch.ones(3)).item()
    6.0

    Args:
        u: The function of one point.
        x: The point ``(d,)``.

    Returns:
        Of the shape of ``u(x)``.
    """
    axes = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    parts = second_order(u, x, axes)
    if parts is not None:
        return parts[-1]
    second: Tensor = vmap(lambda v: directional_derivatives(u, x, v)[2])(axes)
    return second.sum(0)


def _series(f: Field, v: Tensor, order: int, along: Callable[..., Any]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function and its derivatives along v, by nesting."""
    if order == 0:
        return lambda z: (f(z),)
    lower = _series(f, v, order - 1, along)
    return lambda z: along(lower, z, v)


def _forward(lower: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The derivatives of the lower orders, and one more of the last of them."""
    values, slopes = jvp(lower, (z,), (v,))[:2]
    return (*values, slopes[-1])


def _reverse(lower: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The same by reverse mode."""
    return (*lower(z), jacrev(lambda y: lower(y)[-1])(z) @ v)


class _WrongForwardError(Exception):
    """Torch has a wrong derivative of this operation's forward derivative."""


class _TrustedForward(TorchFunctionMode):
    """Stops at operations whose forward derivative torch (2.13) differentiates wrongly, without an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRONG:
            raise _WrongForwardError(func.__name__)
        return func(*args, **(kwargs or {}))


_WRONG = {
    *(F.layer_norm, torch.layer_norm, torch.native_layer_norm),
    *(F.instance_norm, torch.instance_norm, F.batch_norm, torch.batch_norm),  # that of batches, in training alone
    *(torch.det, torch.linalg.det, torch.slogdet, torch.linalg.slogdet, torch.logdet),
    *(torch.linalg.solve, torch.linalg.solve_ex, Tensor.det, Tensor.slogdet, Tensor.logdet),
}
