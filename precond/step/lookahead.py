"""EMA-Nesterov: gradients ahead of the iterate, along the trend of its path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.step.schedules import Scheduled
from solvers.outcome.arguments import number
from solvers.precision import widen


@dataclass(frozen=True)
class EMANesterov:
    r"""Take each step from a point ahead along the average of past moves, around any method :math:`\mathcal A`.

    A number as ``lookahead`` stands for ``strength``.

    .. math:: \theta_{t+1} = \mathcal A(\theta_t + \beta_t m_t), \qquad
        m_{t+1} = \gamma m_t + (1 - \gamma)(\theta_{t+1} - \theta_t)

    While training the parameters hold the point ahead, :math:`\theta_t + \beta_t m_t`, where the loop takes its
    gradients; ``with optimizer.without_lookahead():`` they hold :math:`\theta_t`. The trend m filters out the noise of
    single steps that Nesterov's momentum extrapolates. Costs one average.

    The trend is a part of the moves that it averages, so that a steady path moves :math:`1 / (1 - \beta)` times as far
    in a step: lower the learning rate by that much. From :math:`\beta = 1` on the path runs away if that lasts.

    Args:
        strength: :math:`\beta`. A function of the step count may begin at zero while the rate warms up, and end there,
            so that parameters and iterate are the same.
        decay: :math:`\gamma`.

    References:
        Yau et al. (2026), algorithm 1, https://arxiv.org/abs/2605.25395
    """

    strength: Scheduled = 0.5
    decay: float = 0.9

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not callable(self.strength):
            number("strength", self.strength, low=0)
        number("decay", self.decay, low=0, high=1, open_high=True)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"lookahead": self.strength, "lookahead_decay": self.decay}


def iterate(p: Tensor, state: dict[str, Any]) -> Tensor:
    r""":math:`\theta = p - \beta m`, for a parameter that is ahead of it."""
    strength = state.get("lookahead", 0.0)
    return p - strength * state["trend"] if strength else p


def looked_ahead(
    params: Sequence[Tensor], values: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
) -> list[Tensor]:
    r"""The points ahead of new iterates.

    Args:
        params: Parameters before the step, ahead of their iterates.
        values: :math:`\theta_{t+1}`.
        states: State of each; gets the new ``trend``, and the ``lookahead`` that its parameter is ahead by.
        group: Options.
    """
    strength, out = group["lookahead"], []
    for p, value, state in zip(params, values, states, strict=True):
        move = widen(value) - widen(iterate(p, state))
        trend = state["trend"] if "trend" in state else torch.zeros_like(move)
        state["trend"], state["lookahead"] = trend.lerp(move, 1 - group["lookahead_decay"]), float(strength)
        out.append(value + strength * state["trend"] if strength else value)
    return out
