"""A bound on the move of a step, momentum and learning rate included, in the metric of the curvature."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.distributed.sharded import any_sharded, is_sharded, like, local, summed
from solvers.precision import widen, working_dtype

#: Steps after which a bound that is active most of the time is told.
_TELL_AFTER = 20


@dataclass(frozen=True)
class Slopes:
    r"""Inner products with M d, the image of a direction under the metric; for :math:`d = M^{-1} g` that is g.

    Attributes:
        params: The k parameters, in the order of the groups.
        direction: ``<d, M d>`` of each, ``(k,)``.
        momentum: ``<v, M d>`` with the momentum v before the step, ``(k,)``; 0 where there is none.
    """

    params: list[Tensor]
    direction: Tensor
    momentum: Tensor

    @staticmethod
    def of(
        params: list[Tensor],
        directions: Mapping[Tensor, Tensor],
        momenta: Mapping[Tensor, Tensor],
        images: Mapping[Tensor, Tensor],
        *,
        wide: bool,
    ) -> Slopes:
        """The slopes of parameters that all have a direction; some may have no momentum.

        Args:
            params: The parameters.
            directions: d.
            momenta: v.
            images: M d.
            wide: Whether to multiply in float64, because products of such numbers may leave float32.
        """
        image = vectors([images[p] for p in params], wide)
        d = vectors([directions[p] for p in params], wide)
        # A momentum that the owner of a sharded parameter keeps is a part of the direction.
        known = [p in momenta and is_sharded(momenta[p]) == is_sharded(images[p]) for p in params]
        if not any(known):
            dd = _over_shards(products(d, image), params)
            return Slopes(params, dd, torch.zeros_like(dd))
        none = torch.zeros(1, dtype=params[0].dtype, device=params[0].device)
        v = vectors([momenta[p] if has else none for p, has in zip(params, known, strict=True)], wide)
        met = [m if has else m.new_zeros(1) for m, has in zip(image, known, strict=True)]
        return Slopes(params, _over_shards(products(d, image), params), _over_shards(products(v, met), params))

    def of_those_in(self, params: Collection[Tensor]) -> Slopes:
        """The slopes of those of the parameters that are given."""
        places = [i for i, p in enumerate(self.params) if p in params]
        if len(places) == len(self.params):
            return self
        return Slopes([self.params[i] for i in places], self.direction[places], self.momentum[places])


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


def vectors(tensors: Sequence[Tensor], wide: bool) -> list[Tensor]:
    """Tensors as vectors, in float32 at least; in float64 where wide and possible; of shards the own one."""
    if any_sharded(tensors):
        tensors = list(map(local, tensors))
    if wide:
        return [t.reshape(-1).to(torch.float64 if t.device.type != "mps" else working_dtype(t)) for t in tensors]
    return [widen(t.reshape(-1)) for t in tensors]


def products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner products of pairs of vectors, ``(k,)`` in float64, on the device of the first."""
    found = [torch.dot(a, b if b.dtype == a.dtype else b.to(a.dtype)) for a, b in zip(left, right, strict=True)]
    if len({(x.device, x.dtype) for x in found}) > 1:
        found = [x.to(found[0].device, torch.float64) for x in found]
    joint = torch.stack(found)
    return joint if joint.device.type == "mps" else joint.double()


def _over_shards(sums: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Numbers ``(k,)`` of parameters, summed over the processes that share them out."""
    places = [i for i, p in enumerate(params) if is_sharded(p)]
    return (
        sums.index_copy(0, torch.tensor(places), summed(sums[places], [params[i] for i in places])) if places else sums
    )


def scaled(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Tensors times a 0-d factor, in their own dtypes and on their own devices."""
    if any_sharded(tensors):
        parts = scaled(list(map(local, tensors)), factor)
        return [like(part, t) if is_sharded(t) else part for part, t in zip(parts, tensors, strict=True)]
    kinds = {(t.device, t.dtype) for t in tensors}
    if len(kinds) == 1:
        return list(torch._foreach_mul(tensors, factor.to(*kinds.pop())))
    return [t * factor.to(t.device, t.dtype) for t in tensors]


def reference_lr(group: Mapping[str, Any]) -> float:
    """The learning rate at which a move may have the whole bound; see :class:`~precond.TrustRegion`."""
    if group["kl_of"] == "direction":
        return float(group["lr"])
    if group["kl_lr"] is not None:
        return float(group["kl_lr"])
    peak = group.get("max_lr", group.get("initial_lr", group["first_lr"]))  # as torch's schedulers write them
    return float(peak) or float(group["lr"])


def _smallest(bounds: set[tuple[float, str]], level: Tensor | None, like: Tensor) -> Tensor | float:
    """The smallest of bounds ``(c, unit)``."""
    plain = [c for c, unit in bounds if unit == "curvature"]
    scaled = [c for c, unit in bounds if unit == "loss"]
    if not scaled or level is None:
        return min(plain + scaled)
    bound = min(scaled) * level.to(like)
    return bound.clamp(max=min(plain)) if plain else bound


def kl_scale(total: Tensor, bound: Tensor | float) -> Tensor:
    r"""Factor that keeps a squared length below a bound: :math:`\nu = \min(1, \sqrt{c / t})`.

    Args:
        total: t; a direction that does not descend has none, and stays the same. Where it overflows there is no such
            factor: NaN, for which the step is refused.
        bound: c.
    """
    within = total.clamp(min=bound)
    return (bound / within).sqrt() + 0 * within


def bounded_move(
    groups: list[dict[str, Any]], slopes: Slopes, lengths: Mapping[Tensor, Tensor], level: Tensor | None = None
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
        level: What bounds in units of the loss are multiplied by, 0-d.

    Returns:
        ``None`` without a bound.

    References:
        Ba, Grosse and Martens (2017), section 5, which bounds d, https://openreview.net/forum?id=SkkTMpjex
    """
    bounds = {(group["kl_clip"], group["kl_unit"]) for group in groups if group["kl_clip"] is not None}
    if not bounds or not slopes.params:
        return None
    bound = _smallest(bounds, level, slopes.direction)
    group_of = {p: group for group in groups for p in group["params"]}
    own = [group_of[p] for p in slopes.params]

    def row(values: list[float]) -> Any:
        """A number for each parameter; one number where all have the same."""
        return values[0] if len(set(values)) == 1 else slopes.direction.new_tensor(values)

    rates = row([reference_lr(group) ** 2 for group in own])
    scale = kl_scale((rates * slopes.direction).sum(), bound)
    dd = scale * scale * slopes.direction
    present = row([float(group["lr"]) ** 2 for group in own])
    mu = [float(group["momentum"]) for group in own]
    if not any(mu) or any(group["kl_of"] == "direction" for group in groups):
        return Move(scale, None, {}, (present * dd).sum(), scale < 1)
    dv, m, zero = scale * slopes.momentum, row(mu), dd.new_zeros(())
    vv = torch.stack([lengths[p].to(dd) if p in lengths else zero for p in slopes.params])
    new = m * dv + dd
    q = m * (m * vv + dv) + new
    n = q
    if any(group["nesterov"] for group in own):
        ahead = dd.new_tensor([float(group["nesterov"]) for group in own])
        n = torch.where(ahead > 0, dd + 2 * m * new + m * m * q, q)
    whole = kl_scale((rates * n).sum(), bound)
    lasting = {p: length for p, length, strength in zip(slopes.params, q.unbind(), mu, strict=True) if strength}
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
