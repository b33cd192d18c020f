"""A bound on the move of a step, momentum and learning rate included, in the metric of the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Steps after which a bound that is active most of the time is told.
_TELL_AFTER = 20


@dataclass(frozen=True)
class Slopes:
    r"""Inner products with M d, the image of a direction under the metric; for :math:`d = M^{-1} g` that is g.

    Attributes:
        direction: ``<d, M d>``.
        momentum: ``<v, M d>`` with the momentum v before the step; ``None`` where there is none.
    """

    direction: Tensor
    momentum: Tensor | None


@dataclass(frozen=True)
class Move:
    r"""What the bound does to a step.

    Attributes:
        directions: Factor of the directions, before momentum.
        whole: Factor of the move, after momentum; ``None`` where it is not measured.
        lengths: Parameter -> its share of :math:`v^\top M v` of the new momentum v.
        kl: Twice the predicted divergence of the move.
        active: 0-d bool, whether the step is shortened.
    """

    directions: Tensor
    whole: Tensor | None
    lengths: dict[Tensor, Tensor]
    kl: Tensor
    active: Tensor


def wide(x: Tensor) -> Tensor:
    """In float64, since squares of large gradients leave float32; in its own dtype where there is none."""
    return x if x.device.type == "mps" else x.double()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, see :func:`wide`."""
    return torch.dot(wide(a).reshape(-1), wide(b).reshape(-1))


def reference_lr(group: Mapping[str, Any]) -> float:
    """The learning rate at which a move may have the whole bound; see :class:`~precond.TrustRegion`."""
    if group["kl_of"] == "direction":
        return float(group["lr"])
    if group["kl_lr"] is not None:
        return float(group["kl_lr"])
    peak = group.get("max_lr", group.get("initial_lr", group["first_lr"]))  # as torch's schedulers write them
    return float(peak) or float(group["lr"])


def kl_scale(total: Tensor, bound: float) -> Tensor:
    r"""Factor that keeps a squared length below a bound: :math:`\nu = \min(1, \sqrt{c / t})`.

    Args:
        total: t; a direction that does not descend has none, and stays the same. Where it overflows there is no such
            factor: NaN, for which the step is refused.
        bound: c.
    """
    scale = torch.where(total > bound, (bound / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt(), 1.0)
    return torch.where(total.isfinite(), scale, torch.nan)


def bounded_move(
    groups: list[dict[str, Any]], slopes: Mapping[Tensor, Slopes], lengths: Mapping[Tensor, Tensor]
) -> Move | None:
    r"""The factors that keep a step within its trust region.

    With the metric :math:`M = P^{-1}`, the damped curvature, each direction is first shortened by itself, so that no
    single gradient fills the momentum; then the move :math:`\eta n`, with n the momentum, or what Nesterov's look-ahead
    makes of it:

    .. math:: \nu_d = \min\Big(1, \sqrt{c / \textstyle\sum_p \bar\eta_p^2 \langle d, M d \rangle_p}\Big), \qquad
        \nu = \min\Big(1, \sqrt{c / \textstyle\sum_p \bar\eta_p^2 \langle n, M n \rangle_p}\Big)

    with the reference rates :math:`\bar\eta`, so that a move :math:`\eta \nu n` has at most
    :math:`c\, (\eta / \bar\eta)^2`. The momentum's length follows from inner products alone,

    .. math:: \langle v, M v \rangle \leftarrow \mu^2 \langle v, M v \rangle + 2 \mu \nu_d \langle v, M d \rangle
        + \nu_d^2 \langle d, M d \rangle

    which is exact as long as M is the same; where M is renewed its length is measured again.

    Args:
        groups: Options of the second half of the step.
        slopes: Of all parameters that have a direction.
        lengths: Parameter -> its share of :math:`v^\top M v` before the step, where it has momentum.

    Returns:
        ``None`` without a bound.

    References:
        Ba, Grosse and Martens (2017), section 5, which bounds d, https://openreview.net/forum?id=SkkTMpjex
    """
    bounds = {group["kl_clip"] for group in groups} - {None}
    entries = [(group, p) for group in groups for p in group["params"] if p in slopes]
    if not bounds or not entries:
        return None
    bound, first = min(bounds), slopes[entries[0][1]].direction

    def row(values: list[Any]) -> Tensor:
        """Numbers as one tensor; tensors and ``None`` for zero as well, where that is what they are."""
        if all(isinstance(value, float) for value in values):
            return first.new_tensor(values)
        zero = first.new_zeros(())
        return torch.stack([value.to(first) if isinstance(value, Tensor) else zero for value in values])

    rates = row([reference_lr(group) ** 2 for group, _ in entries])
    dd = row([slopes[p].direction for _, p in entries])
    scale = kl_scale((rates * dd).sum(), bound)
    kept = scale > 0  # 0 where the length overflows; nothing of such a direction is left
    dd = torch.where(kept, scale.square() * dd, 0)
    present = row([float(group["lr"]) ** 2 for group, _ in entries])
    mu = [float(group["momentum"]) for group, _ in entries]
    if not any(mu) or any(group["kl_of"] == "direction" for group in groups):
        return Move(scale, None, {}, (present * dd).sum(), scale < 1)
    dv = torch.where(kept, scale * row([slopes[p].momentum for _, p in entries]), 0)
    m = row(mu)
    new = m * dv + dd
    q = m * (m * row([lengths.get(p) for _, p in entries]) + dv) + new
    n = q
    if any(group["nesterov"] for group, _ in entries):
        ahead = row([float(group["nesterov"]) for group, _ in entries])
        n = torch.where(ahead > 0, dd + 2 * m * new + m.square() * q, q)
    whole = kl_scale((rates * n).sum(), bound)
    lasting = {p: length for (_, p), length, strength in zip(entries, q.unbind(), mu, strict=True) if strength}
    return Move(scale, whole, lasting, whole.square() * (present * n).sum(), (scale < 1) | (whole < 1))


@dataclass(frozen=True)
class BoundRecord:
    """How often the bound was active, counted without waiting for the device.

    Attributes:
        steps: Steps that had a bound.
        told: Whether it was told that most of them were shortened.
        active: Number of those that were, 0-d.
        last: Twice the predicted divergence of the last move.
    """

    steps: int = 0
    told: bool = False
    active: Tensor | int = 0
    last: Tensor | float = 0.0

    def after(self, move: Move) -> BoundRecord:
        """The record with one more step."""
        return BoundRecord(self.steps + 1, self.told, self.active + move.active.to(torch.int64), move.kl)

    @property
    def share(self) -> float:
        """Share of the steps in which it was active."""
        return float(self.active) / self.steps if self.steps else 0.0

    @property
    def kl(self) -> float:
        """Predicted divergence of the last move."""
        return float(self.last) / 2

    def worth_telling(self) -> bool:
        """Whether it was active in most steps, which is to be told once; looked at now and then."""
        return not self.told and self.steps >= _TELL_AFTER and not self.steps % _TELL_AFTER and self.share > 0.5
