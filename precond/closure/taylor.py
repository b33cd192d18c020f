"""Derivatives of a network along directions of its input, by forward mode alone, for residuals of equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from solvers.outcome.arguments import whole

Field = Callable[[Tensor], Tensor]


def directional_derivatives(u: Field, x: Tensor, v: Tensor, order: int = 2) -> tuple[Tensor, ...]:
    r"""A function and its derivatives along a direction.

    .. math:: \partial_t^k\, u(x + t v) \text{ at } t = 0, \qquad k = 0, \dots, \text{order}

    By forward mode nested ``order`` times. Within a :class:`~precond.PointwiseResidual`, whose Jacobian is a reverse
    pass over all this, that is many times cheaper than ``torch.func.hessian`` or nested ``torch.func.grad``.

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

    def series(f: Field, left: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if left == 0:
            return lambda z: (f(z),)

        def deeper(z: Tensor) -> tuple[Tensor, ...]:
            # The derivatives of the lower orders, and one more of the last of them.
            pushed = jvp(series(f, left - 1), (z,), (v,))
            return (*pushed[0], pushed[1][-1])

        return deeper

    return series(u, order)(x)


def laplacian(u: Field, x: Tensor) -> Tensor:
    r"""The sum of the pure second derivatives, :math:`\sum_i \partial^2 u / \partial x_i^2`.

    By forward mode, all axes in one batch; see :func:`directional_derivatives` for why.

    >>> laplacian(lambda p: p.square().sum(), torch.ones(3)).item()
    6.0

    Args:
        u: The function of one point.
        x: The point ``(d,)``.

    Returns:
        Of the shape of ``u(x)``.
    """
    axes = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    second: Tensor = vmap(lambda v: directional_derivatives(u, x, v)[2])(axes)
    return second.sum(0)
