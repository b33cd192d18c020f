"""A learning rate that finds itself: longer steps while the gradient goes on to agree with the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.outcome.arguments import number
from solvers.precision import working_dtype


@dataclass(frozen=True)
class AdaptiveRate:
    r"""A factor of the learning rate for each parameter, which learns from the slope along its last direction.

    With the gradient :math:`g_t` and the direction :math:`d_{t-1}` of the step before, the derivative of the loss with
    respect to the length of that step is :math:`-\langle g_t, d_{t-1} \rangle`: where it is negative, a longer step
    would have been better. Its sign alone moves the factor f, which begins at one,

    .. math:: f_t = \operatorname{clip}\bigl(f_{t-1}\, c^{\,(\eta_t / \bar\eta) \operatorname{sign}
        \langle g_t, d_{t-1} \rangle},\ 1 / f_{max},\ f_{max}\bigr), \qquad
        \text{step: } \eta_t \max(f_t, f_{min})\, d_t

    with ``growth`` c, and the learning rate :math:`\eta_t` over its peak :math:`\bar\eta`: a step that a schedule has
    made short says little, and a schedule that ends at zero still does. The gradient is that of a batch of its own, so
    on average noise has no sign.

    By default no step is shorter than ``lr`` says, while f itself may fall: at a floor of its own, noise alone would
    lift it. What pays at once is not what pays at the end: on noisy gradients
    the slope along the last direction soon has either sign, at rates far below those that train best (Wu et al., 2018,
    https://arxiv.org/abs/1803.02021), and along sharp directions it alternates while the loss goes down. So ``lr`` is
    the smallest rate, and ``most`` times it the largest.

    Costs one inner product and the memory of one direction for each parameter.

    Methods that learn from layers follow their momentum, which holds the last directions, in place of
    :math:`d_{t-1}`: it is there anyway, and ``kl_clip`` takes the same products, so that without a bound these come on
    top. The factor multiplies the move, and what ``kl_clip`` lets pass goes with its square, as with that of the
    learning rate. The momentum itself, weight decay, parameters that take :class:`~precond.AdamStep`, and the half of
    a step that ``precondition()`` is do not feel it.

    Args:
        growth: c, above 1. A factor of ten takes ``log(10) / log(growth)`` steps, 24 at 1.1.
        least: :math:`f_{min}`, in (0, 1]: the least factor of a step.
        most: :math:`f_{max}`, at least 1.

    Raises:
        ValueError: If a number is out of range.

    References:
        Jacobs (1988), one rate for each weight by the agreement of slopes; Almeida et al. (1998), one inner product;
        Baydin et al. (2018), section 4.1, the derivative with a momentum's direction, and multiplicatively in
        section 6, https://arxiv.org/abs/1703.04782. The sign, the bounds and the weight by the schedule are ours.
    """

    growth: float = 1.1
    least: float = 1.0
    most: float = 10.0

    def __post_init__(self) -> None:
        """Validate the arguments."""
        number("growth of AdaptiveRate", self.growth, low=1, open_low=True)
        number("least of AdaptiveRate", self.least, low=0, high=1, open_low=True)
        number("most of AdaptiveRate", self.most, low=1)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"rate_growth": self.growth, "rate_least": self.least, "rate_most": self.most}


#: Entries of a group whose rates are what its schedule says.
CONSTANT: dict[str, Any] = {"rate_growth": 1.0, "rate_least": 1.0, "rate_most": 1.0}
#: Entries of a parameter's state.
OWN = frozenset({"last_direction", "rate"})


def rate_entries(given: Any) -> dict[str, Any]:
    """The entries of a parameter group for ``adaptive_rate=``.

    Raises:
        TypeError: If it is no :class:`AdaptiveRate`.
    """
    if not (given is None or isinstance(given, AdaptiveRate)):
        raise TypeError(
            "adaptive_rate is an AdaptiveRate(growth, least, most), None for the group's lr, or for methods that use "
            f"gradients alone 'auto', which is one of the two by whether an lr was given; got {given!r}."
        )
    return dict(CONSTANT) if given is None else given.in_groups()


def is_adaptive(group: dict[str, Any]) -> bool:
    """Whether the rates of a group's parameters learn."""
    return bool(group.get("rate_growth", 1.0) != 1)


def refuse_unfollowed(me: str, group: dict[str, Any], scheduled: bool, sized: bool) -> None:
    """Refuse rates of a group that learn where there is nothing to learn from, or nobody who would hear.

    Args:
        me: The method, which follows a momentum.
        group: The options.
        scheduled: Whether its momentum is a function of the step count.
        sized: Whether a quadratic model finds the length of each step.

    Raises:
        ValueError: Naming the option, and what to give in its place.
    """
    if sized and is_adaptive(group):
        raise ValueError(
            f"{me}: adaptive_rate has no effect with step_size=QuadraticModel(), which finds the length of each step "
            "itself. Give one of them."
        )
    if is_adaptive(group) and not group["momentum"] and not scheduled:
        raise ValueError(
            f"{me}: adaptive_rate follows the slope along the momentum, and there is none. Give it momentum, such as "
            "Momentum(0.9, nesterov=True)."
        )


def rate_state(like: Tensor) -> dict[str, Any]:
    """What a parameter keeps of it, before the first step.

    Args:
        like: Zeros, as its direction has them.
    """
    return {"last_direction": like, "rate": torch.ones((), dtype=like.dtype, device=like.device)}


def adapted(
    directions: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
) -> list[Tensor]:
    """Directions times the factors of their parameters; the device is not waited for.

    Args:
        directions: d.
        gradients: g, each of the shape of its d.
        states: Of each parameter; get new entries ``last_direction`` and ``rate``.
        group: Options.
    """
    places: dict[Any, list[int]] = {}
    for i, d in enumerate(directions):
        places.setdefault((d.device, d.dtype), []).append(i)
    out = list(directions)
    for some in places.values():
        own, found = [states[i] for i in some], [out[i] for i in some]
        products = torch._foreach_mul([gradients[i] for i in some], [state["last_direction"] for state in own])
        slopes = torch.stack([x.sum() for x in products])
        signs = (slopes > 0).to(slopes) - (slopes < 0).to(slopes)
        signs = torch.where(slopes.isnan(), slopes, signs)  # a last direction that was spoilt refuses the step
        factors = torch.stack([state["rate"] for state in own]) * group["rate_growth"] ** (_weight(group) * signs)
        factors.clamp_(1 / group["rate_most"], group["rate_most"])
        for state, d, rate in zip(own, found, factors.unbind(), strict=True):
            state["last_direction"], state["rate"] = d, rate
        applied = list(factors.clamp(min=group["rate_least"]).unbind())
        for i, d in zip(some, torch._foreach_mul(found, applied), strict=True):
            out[i] = d
    return out


def followed(
    params: Sequence[Tensor], slopes: Tensor, states: Mapping[Tensor, dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> dict[Tensor, Any]:
    """Factors by parameter after a step's slopes, for optimizers that keep a momentum; the device is not waited for.

    Args:
        params: The k parameters.
        slopes: ``<g, v>`` of each with its momentum v, ``(k,)``; 0 where there is none.
        states: Of each parameter; get a new entry ``rate`` where the group's rates learn.
        groups: Options.

    Returns:
        The factor of each move: numbers of Python where the parameters lie in the memory of the processor, 0-d
        elsewhere.
    """
    place = {p: i for i, p in enumerate(params)}
    out: dict[Tensor, Any] = {}
    for group in groups:
        own = [p for p in group["params"] if p in place] if is_adaptive(group) else []
        if not own:
            continue
        some = slopes[[place[p] for p in own]] if len(own) < len(params) else slopes
        known = [states[p].get("rate") for p in own]
        rates = torch.stack([some.new_ones(()) if rate is None else rate.to(some) for rate in known])
        if group["momentum"]:
            along = (some > 0).to(some) - (some < 0).to(
                some
            )  # 0 for what has overflowed to NaN, and without a momentum
            weight = _weight(group)
            growth = group["rate_growth"] ** (-weight if group["maximize"] else weight)  # v is what moves take off
            rates = (rates * growth**along).clamp(1 / group["rate_most"], group["rate_most"])
        for p, rate in zip(own, rates.unbind(), strict=True):
            states[p]["rate"] = rate.to(working_dtype(p))
        applied = rates.clamp(min=group["rate_least"])
        out |= zip(own, applied.tolist() if applied.device.type == "cpu" else applied.unbind(), strict=True)
    return out


def _weight(group: dict[str, Any]) -> float | Tensor:
    """The learning rate over its peak, at most one."""
    lr, peak = group["lr"], group.get("max_lr", group.get("initial_lr", group["first_lr"]))
    if isinstance(lr, Tensor) or isinstance(peak, Tensor):
        return torch.as_tensor(lr / peak).reshape(()).nan_to_num(1.0).clamp(max=1.0)
    return float(min(lr / peak, 1.0)) if peak > 0 else 1.0
