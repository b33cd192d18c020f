"""From a preconditioned gradient to the move: momentum, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from precond.distributed.sharded import any_sharded, is_sharded, like, local
from precond.step.lookahead import looked_ahead
from precond.step.norm_control import controlled_values, is_controlled, is_matrix
from precond.step.trust_region import scaled

Decay = Literal["decoupled", "l2", "independent", "corrected", "cautious"]

#: Entries of a parameter's state that the second half of the step writes.
_WRITTEN = ("momentum_buffer", "trend", "lookahead", "radius")

#: Ways that compare the learning rate with its largest value.
SCHEDULED_DECAY = ("independent", "corrected")


def decay_rate(group: dict[str, Any]) -> float | Tensor:
    r"""Share of a parameter that weight decay takes away in one step.

    With learning rate :math:`\eta`, weight decay :math:`\lambda` and the peak :math:`\eta_{max}` of the learning rate:

    * ``"decoupled"``: :math:`\eta \lambda`, as AdamW (Loshchilov and Hutter, 2019, algorithm 2,
      https://arxiv.org/abs/1711.05101, as ``torch`` has it);
    * ``"cautious"``: the same, of those entries of p alone that agree in sign with the update, or where one is zero
      (Chen et al., 2025, algorithm 1, https://arxiv.org/abs/2510.12402);
    * ``"independent"``: :math:`(\eta / \eta_{max}) \lambda`, which follows the schedule but not the size of the
      learning rate (Wortsman et al., 2023, section 3.2, https://arxiv.org/abs/2309.14322);
    * ``"corrected"``: :math:`(\eta^2 / \eta_{max}) \lambda`, which holds the ratio of gradient and weight norms in
      normalised layers steady over a schedule (Defazio, 2025, AdamC, https://arxiv.org/abs/2506.02285);
    * ``"l2"``: zero, because :math:`\lambda p` is part of the gradient.

    The peak is what ``torch``'s schedulers call ``initial_lr``, or ``max_lr`` where there is one (``OneCycleLR``);
    without a scheduler it is the learning rate that the group began with.
    """
    lr, decay, strength = group["lr"], group["decay"], group["weight_decay"]
    if decay == "l2":
        return 0.0
    if decay in SCHEDULED_DECAY:
        peak = max(float(group["initial_lr"]), float(group.get("max_lr", 0.0)))
        return strength * lr / peak * (lr if decay == "corrected" else 1.0)
    return lr * strength


def regularized(gradients: dict[Tensor, Tensor], groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    r"""Gradients of :math:`L + \tfrac{\lambda}{2} \lVert p \rVert^2` in groups with L2 decay; the others as they are.

    Under ``maximize`` the penalty is subtracted. The input stays unchanged.
    """
    out = dict(gradients)
    for group in groups:
        if group["decay"] == "l2" and group["weight_decay"]:
            alpha = -group["weight_decay"] if group["maximize"] else group["weight_decay"]
            out |= {p: out[p].add(p, alpha=alpha) for p in group["params"] if p in out}
    return out


def apply_update(
    params: list[Tensor],
    directions: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    scale: Tensor | float | None = None,
    of: list[Tensor] | None = None,
    shortened: Tensor | float = 1.0,
    rates: Sequence[Tensor | float] = (),
) -> list[Tensor]:
    r"""Momentum, weight decay and the values that parameters are to take: those of ``torch.optim.SGD``, up to rounding.

    .. math:: v \leftarrow \mu v + \nu_d d, \qquad p \leftarrow (1 - r) p - \eta \nu v

    with the rate r of :func:`decay_rate` and the factors :math:`\nu_d` and :math:`\nu` of a trust region. Matrices
    under a control of norms move as :mod:`~precond.step.norm_control` says, and a look-ahead comes last. Nothing is
    changed in place: parameters move when all values are known.

    Args:
        params: Parameters.
        directions: Preconditioned gradients.
        states: State of each parameter; gets a new ``momentum_buffer`` where there is momentum.
        group: Options ``lr``, ``momentum``, ``nesterov``, ``weight_decay``, ``decay``, ``maximize``.
        scale: :math:`\nu`, a number or 0-d; 1 if ``None``.
        of: The sharded parameters, of which ``params`` are the parts in this process; ``None`` for whole ones.
        shortened: :math:`\nu_d`, a number or 0-d.
        rates: Factors of the moves, one for each parameter; none for ones.

    Returns:
        The new values.
    """
    if any_sharded(params):
        return _update_of_shards(params, directions, states, group, scale, shortened, rates)
    lr, momentum = group["lr"], group["momentum"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    if group["maximize"]:
        directions = list(torch._foreach_neg(directions))
    apart = not momentum or group["nesterov"] or any("momentum_buffer" not in state for state in states)
    if isinstance(shortened, Tensor) or apart:
        directions, shortened = scaled(directions, shortened), 1.0
    if momentum:
        known = [i for i, state in enumerate(states) if "momentum_buffer" in state]
        if known:
            before = [states[i]["momentum_buffer"] for i in known]
            if shortened == 1:  # in one pass over the memory
                kept = list(torch._foreach_add([directions[i] for i in known], before, alpha=momentum))
            else:
                kept = list(torch._foreach_mul(before, momentum))
                torch._foreach_add_(kept, [directions[i] for i in known], alpha=shortened)
            for i, buffer in zip(known, kept, strict=True):
                states[i]["momentum_buffer"] = buffer
        for state, d in zip(states, directions, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = d.clone()  # it may be a gradient, to which the loop writes
        buffers = [state["momentum_buffer"] for state in states]
        directions = list(torch._foreach_add(directions, buffers, alpha=momentum)) if group["nesterov"] else buffers
    values = params
    if group["weight_decay"] and group["decay"] != "l2":
        rate = decay_rate({**group, "lr": lr})
        if group["decay"] == "cautious":
            agree = [(d.sign() * p >= 0).to(p.dtype) for p, d in zip(params, directions, strict=True)]
            values = list(torch._foreach_mul(params, [1 - rate * mask for mask in agree]))
        else:
            values = list(torch._foreach_mul(params, 1 - rate))
    if rates:
        directions = _each_scaled(directions, rates)
    if isinstance(scale, Tensor):
        directions = scaled(directions, scale)
    elif scale is not None and is_controlled(group):  # what it controls is the update, apart from its rate
        directions = list(torch._foreach_mul(directions, scale))
    elif scale is not None:
        lr = lr * scale
    if isinstance(lr, Tensor):
        found = list(torch._foreach_sub(values, list(torch._foreach_mul(directions, lr))))
    else:
        found = list(torch._foreach_add(values, directions, alpha=-lr))
    if is_controlled(group):
        whole = params if of is None else of
        places = [i for i, p in enumerate(whole) if is_matrix(p)]
        v, u, some = ([xs[i] for i in places] for xs in (values, directions, whole))
        own = [states[i] for i in places]
        for i, value in zip(places, controlled_values(v, u, own, {**group, "lr": lr}, some), strict=True):
            found[i] = value
    return looked_ahead(params, found, states, group) if group.get("lookahead") is not None else found


def _update_of_shards(
    params: list[Tensor],
    directions: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    scale: Tensor | float | None,
    shortened: Tensor | float,
    rates: Sequence[Tensor | float],
) -> list[Tensor]:
    """:func:`apply_update` on the parts that lie in this process; all but norms is entry by entry."""
    # A momentum that a method keeps itself lies with the owner of its parameter.
    names = [name for name in _WRITTEN if group["momentum"] or name != "momentum_buffer"]
    own = [{name: local(state[name]) for name in names if name in state} for state in states]
    parts = list(map(local, params)), list(map(local, directions))
    values = apply_update(*parts, own, group, scale, params, shortened, rates)
    for p, state, mine in zip(params, states, own, strict=True):
        cut = {name for name in ("momentum_buffer", "trend") if name in mine and is_sharded(p)}
        state.update({name: like(x, p) if name in cut else x for name, x in mine.items()})
    return [like(value, p) if is_sharded(p) else value for p, value in zip(params, values, strict=True)]


def _each_scaled(directions: list[Tensor], rates: Sequence[Tensor | float]) -> list[Tensor]:
    """Each direction times its number, in its own precision."""
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    if len(numbers) == len(rates):
        return list(torch._foreach_mul(directions, numbers))
    return [d * rate.to(d) if isinstance(rate, Tensor) else d * rate for d, rate in zip(directions, rates, strict=True)]
