"""What happens to a preconditioned gradient before it moves the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kl_scale(pairs: list[tuple[Tensor, Tensor, float]], bound: float) -> Tensor:
    r"""Factor that keeps the predicted KL divergence of a step below a bound.

    .. math:: \nu = \min\Big(1, \sqrt{c / \textstyle\sum_p \eta_p^2\, \langle d_p, g_p \rangle}\Big)

    where :math:`\langle d, g \rangle = d^\top C d` if :math:`d = C^{-1} g`.

    Args:
        pairs: Direction d, gradient g and learning rate of every parameter.
        bound: c.

    References:
        Ba, Grosse and Martens (2017), section 5, https://openreview.net/forum?id=SkkTMpjex
    """
    products = [(d * g).sum() * lr**2 for d, g, lr in pairs]
    total = torch.stack([p.to(products[0]) for p in products]).sum()
    # A direction that does not descend has no such bound; it is left alone.
    return torch.where(total > bound, (bound / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt(), 1.0)


def apply_update(
    params: list[Tensor], directions: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> None:
    r"""Decoupled weight decay, momentum, and the move itself, in the arithmetic of ``torch.optim.SGD``.

    .. math:: v \leftarrow \mu v + d, \qquad p \leftarrow (1 - \eta \lambda) p - \eta v

    Args:
        params: Parameters, changed in place.
        directions: Preconditioned gradients; overwritten.
        states: State of each parameter; holds ``momentum_buffer`` where there is momentum.
        group: Options ``lr``, ``momentum``, ``nesterov``, ``weight_decay``, ``maximize``.
    """
    lr, momentum = group["lr"], group["momentum"]
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    if group["maximize"]:
        directions = list(torch._foreach_neg(directions))
    if momentum:
        old: list[tuple[dict[str, Any], Tensor]] = []
        fresh: list[tuple[dict[str, Any], Tensor]] = []
        for state, d in zip(states, directions, strict=True):
            (old if "momentum_buffer" in state else fresh).append((state, d))
        for state, d in fresh:
            state["momentum_buffer"] = d.clone()
        if old:
            buffers = [state["momentum_buffer"] for state, _ in old]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, [d for _, d in old])
        buffers = [state["momentum_buffer"] for state in states]
        directions = list(torch._foreach_add(directions, buffers, alpha=momentum)) if group["nesterov"] else buffers
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, list(torch._foreach_mul(directions, lr)))
    else:
        torch._foreach_add_(params, directions, alpha=-lr)
