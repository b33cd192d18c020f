"""A bound on the move of a step, momentum and learning rate included, in the metric of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precond.distributed.sharded import any_sharded, is_sharded, like, local, summed
from solvers.precision import widen, working_dtype

#: Steps after which a bound that is active most of the time is told.
_TELL_AFTER = 20
# Entries that are widened at a time.
_PART = 2**15


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
        alone: Sequence[Tensor],
        groups: Sequence[Sequence[Tensor]],
        directions: Mapping[Tensor, Tensor],
        momenta: Mapping[Tensor, Tensor],
        images: Mapping[Tensor, Tensor],
        *,
        wide: bool,
    ) -> Slopes:
        """The slopes of parameters that all have a direction; some may have no momentum.

        Args:
            alone: Parameters, see :class:`~precond.step.alike.Alike`.
            groups: Others, those of one shape together.
            directions: d.
            momenta: v.
            images: M d.
            wide: Whether to multiply in float64, because products of such numbers may leave float32.
        """
        if not (alone or groups):
            return Slopes([], torch.zeros(0), torch.zeros(0))
        found = [_each(alone, directions, momenta, images, wide)] if alone else []
        for group in groups:
            k = len(group)
            rows = [directions[p] for p in group]
            rows += [v if (v := momenta.get(p)) is not None else torch.zeros_like(p) for p in group] if momenta else []
            image = joint([images[p] for p in group], wide)
            sums = (joint(rows, wide).view(-1, k, image.shape[1]) * image).sum(-1)
            found.append(sums if momenta else torch.cat([sums, torch.zeros_like(sums)]))
        params = [*alone, *(p for group in groups for p in group)]
        sums = torch.cat(_alike(found), dim=1)
        sums = sums if sums.device.type == "mps" else sums.double()
        return Slopes(params, *_over_shards(sums, params).unbind())

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
        directions: Factor of the directions, before momentum; like all numbers here one of Python where the parameters
            lie in the memory of the processor, and 0-d elsewhere, where nobody waits for it.
        whole: Factor of the move, after momentum; ``None`` where it is not measured.
        lengths: Parameter -> its share of :math:`v^\top M v` of the new momentum v.
        kl: Twice the predicted divergence of the move.
        active: Whether the step is shortened.
    """

    directions: Tensor | float
    whole: Tensor | float | None
    lengths: dict[Tensor, Tensor]
    kl: Tensor | float
    active: Tensor | bool


def vectors(tensors: Sequence[Tensor], wide: bool) -> list[Tensor]:
    """Tensors as vectors, in float32 at least; in float64 where wide and possible; of shards the own one."""
    if any_sharded(tensors):
        tensors = list(map(local, tensors))
    if not wide and all(t.dtype is torch.float32 or t.dtype is torch.float64 for t in tensors):
        return [t.reshape(-1) for t in tensors]
    return [_widened(t.reshape(-1), wide) for t in tensors]


def joint(tensors: Sequence[Tensor], wide: bool) -> Tensor:
    """Tensors of one shape as rows ``(k, n)``, in the precision of :func:`vectors`."""
    return _widened(torch.stack(list(tensors)).view(len(tensors), -1), wide)


def _widened(t: Tensor, wide: bool) -> Tensor:
    return t.to(torch.float64 if t.device.type != "mps" else working_dtype(t)) if wide else widen(t)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The inner product of two tensors in float64, 0-d.

    On the processor part by part: copies of large tensors in float64 take fresh memory, which costs more than all else.
    """
    a, b = vectors([left, right], False)
    if a.device.type != "cpu" or a.dtype == b.dtype == torch.float64 or len(a) <= _PART:
        return torch.dot(_widened(a, True), _widened(b, True))
    parts = zip(a.split(_PART), b.split(_PART), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum()


def _each(
    params: Sequence[Tensor],
    directions: Mapping[Tensor, Tensor],
    momenta: Mapping[Tensor, Tensor],
    images: Mapping[Tensor, Tensor],
    wide: bool,
) -> Tensor:
    """``<d, M d>`` and ``<v, M d>`` of parameters one by one, ``(2, k)``."""
    image, d = vectors([images[p] for p in params], wide), vectors([directions[p] for p in params], wide)
    # A momentum that the owner of a sharded parameter keeps is a part of the direction.
    known = [p in momenta and is_sharded(momenta[p]) == is_sharded(images[p]) for p in params]
    none = torch.zeros(1, dtype=params[0].dtype, device=params[0].device)
    v = vectors([momenta[p] if has else none for p, has in zip(params, known, strict=True)], wide)
    met = [m if has else m.new_zeros(1) for m, has in zip(image, known, strict=True)]
    pairs = zip([*d, *v], [*image, *met], strict=True)
    return torch.stack(_alike([torch.dot(a, b if b.dtype == a.dtype else b.to(a.dtype)) for a, b in pairs])).view(2, -1)


def _alike(numbers: list[Tensor]) -> list[Tensor]:
    """Numbers in one precision and on one device, those of the first unless they differ."""
    first = numbers[0]
    if any(x.device != first.device or x.dtype != first.dtype for x in numbers):
        return [x.to(first.device, torch.float64) for x in numbers]
    return numbers


def _over_shards(sums: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Numbers ``(2, k)`` of parameters, summed over the processes that share them out."""
    places = [i for i, p in enumerate(params) if is_sharded(p)] if any_sharded(params) else []
    if not places:
        return sums
    found = summed([sums[:, i] for i in places], [params[i] for i in places])
    return sums.index_copy(1, torch.tensor(places, device=sums.device), torch.stack(found, 1))


def scaled(tensors: list[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Tensors times a number, in their own dtypes and on their own devices."""
    if any_sharded(tensors):
        parts = scaled(list(map(local, tensors)), factor)
        return [like(part, t) if is_sharded(t) else part for part, t in zip(parts, tensors, strict=True)]
    if not isinstance(factor, Tensor):
        return tensors if factor == 1 else list(torch._foreach_mul(tensors, factor))
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
    return peak_lr(group) or float(group["lr"])


def peak_lr(group: Mapping[str, Any]) -> float:
    """The largest learning rate of a group, as far as torch's schedulers write it there, or its first one."""
    return float(group.get("max_lr", group.get("initial_lr", group["first_lr"])))


def _smallest(bounds: set[tuple[float, str]], level: Tensor | float | None, like: Tensor) -> Any:
    """The smallest of bounds ``(c, unit)``."""
    plain = [c for c, unit in bounds if unit == "curvature"]
    scaled = [c for c, unit in bounds if unit == "loss"]
    if not scaled or level is None:
        return min(plain + scaled)
    bound: Any = min(scaled) * (_row(level.to(like)) if isinstance(level, Tensor) else level)
    return bound if not plain else bound.clamp(max=min(plain)) if isinstance(bound, Tensor) else min(bound, *plain)


def kl_scale(total: Any, bound: Any) -> Any:
    r"""Factor that keeps a squared length below a bound: :math:`\nu = \min(1, \sqrt{c / t})`.

    Args:
        total: t, a tensor or a number of NumPy; a direction that does not descend has none, and stays the same. Where
            it overflows there is no such factor: NaN, for which the step is refused.
        bound: c.
    """
    within = total.clip(min=bound) if isinstance(total, Tensor) else np.maximum(total, bound)
    return (bound / within) ** 0.5 + 0 * within


def _row(numbers: Tensor) -> Any:
    """Numbers as NumPy has them where they lie in the memory of the processor, because its calls cost less there."""
    return numbers.numpy() if numbers.device.type == "cpu" else numbers


def _sum(row: Any) -> Any:
    """The sum of a row, by the shortest way to it."""
    return row.sum() if isinstance(row, Tensor) else np.add.reduce(row)


def _plain(number: Any) -> Any:
    """A number of NumPy as one of Python, which multiplies tensors; a tensor as it is."""
    return number if isinstance(number, Tensor) else number.item()


def bounded_move(
    groups: list[dict[str, Any]],
    slopes: Slopes,
    lengths: Mapping[Tensor, Tensor],
    level: Tensor | float | None = None,
    rates: Mapping[Tensor, Tensor | float] = MappingProxyType({}),
) -> Move | None:
    r"""The factors that keep a step within its trust region.

    With the metric :math:`M = P^{-1}`, the damped curvature, each direction is first shortened by itself, so that no
    single gradient fills the momentum; then the move :math:`\eta n`, with n the momentum, or what Nesterov's look-ahead
    makes of it:

    .. math:: \nu_d = \min\Big(1, \sqrt{c / \textstyle\sum_p \bar\eta_p^2 \langle d, M d \rangle_p}\Big), \qquad
        \nu = \min\Big(1, \sqrt{c / \textstyle\sum_p \bar\eta_p^2 \langle n, M n \rangle_p}\Big)

    with the reference rates :math:`\bar\eta` (0 for a group that stays where it is while others move), so that a move
    :math:`\eta \nu n` has at most :math:`c\, (\eta / \bar\eta)^2`. The momentum's length follows from inner products
    alone,

    .. math:: \langle v, M v \rangle \leftarrow \mu^2 \langle v, M v \rangle + 2 \mu \nu_d \langle v, M d \rangle
        + \nu_d^2 \langle d, M d \rangle

    which is exact as long as M is the same; where M is renewed its length is measured again.

    Args:
        groups: Options of the second half of the step.
        slopes: Of all parameters that have a direction.
        lengths: Parameter -> its share of :math:`v^\top M v` before the step, where it has momentum.
        level: What bounds in units of the loss are multiplied by.
        rates: Factors of the moves that come after, by parameter (:class:`~precond.AdaptiveRate`); as with learning
            rates, what a move may have goes with their squares.

    Returns:
        ``None`` without a bound.

    References:
        Ba, Grosse and Martens (2017), section 5, which bounds d, https://openreview.net/forum?id=SkkTMpjex
    """
    bounds = {(group["kl_clip"], group["kl_unit"]) for group in groups if group["kl_clip"] is not None}
    if not bounds:
        return None
    if not slopes.params:  # all that has a gradient moves beside the bound; other momenta keep their lengths
        return Move(1.0, None, {}, 0.0, False)
    if len(groups) == 1:
        own = groups * len(slopes.params)
    else:
        group_of = {p: group for group in groups for p in group["params"]}
        own = [group_of[p] for p in slopes.params]
    with np.errstate(all="ignore"):  # what is not finite refuses the step
        return _bounded(groups, own, slopes, lengths, _smallest(bounds, level, slopes.direction), rates)


def _bounded(
    groups: list[dict[str, Any]],
    own: list[dict[str, Any]],
    slopes: Slopes,
    lengths: Mapping[Tensor, Tensor],
    bound: Any,
    rates_after: Mapping[Tensor, Tensor | float],
) -> Move:
    """:func:`bounded_move` within a bound, given the group of each parameter."""
    like = slopes.direction

    def row(option: Callable[[dict[str, Any]], float]) -> Any:
        """A number for each parameter; one number where all have the same."""
        if len(groups) == 1:
            return option(own[0])
        values = [option(group) for group in own]
        return values[0] if len(set(values)) == 1 else _row(like.new_tensor(values))

    d = _row(like)
    resting = all(float(group["lr"]) == 0 for group in groups)  # as in the first step of a warm-up
    rates = row(lambda group: reference_lr(group) ** 2 if resting or float(group["lr"]) else 0.0)
    scale = kl_scale(_sum(rates * d), bound)
    dd = scale * scale * d
    present = row(lambda group: float(group["lr"]) ** 2)
    if rates_after:
        each = [rates_after.get(p, 1.0) for p in slopes.params]
        numbers = [x for x in each if not isinstance(x, Tensor)]
        column = (
            like.new_tensor(numbers)
            if len(numbers) == len(each)
            else torch.stack([x.to(like) if isinstance(x, Tensor) else like.new_ones(()) for x in each])
        )
        present = present * _row(column) ** 2
    m = row(lambda group: float(group["momentum"]))
    strengths = [group["momentum"] for group in own]
    if not any(strengths) or any(group["kl_of"] == "direction" for group in groups):
        return Move(_plain(scale), None, {}, _plain(_sum(present * dd)), _plain(scale < 1))
    # A momentum is made of what is taken off parameters, which where they ascend is -d.
    signs = row(lambda group: -1.0 if group["maximize"] else 1.0)
    dv, zero = scale * signs * _row(slopes.momentum), like.new_zeros(())
    known = [lengths.get(p, zero) for p in slopes.params]
    if any(x.device != like.device for x in known):
        known = [x.to(like.device) for x in known]
    vv = _row(torch.stack(known).to(like.dtype))
    new = m * dv + dd
    q = m * (m * vv + dv) + new
    n = q
    if any(group["nesterov"] for group in own):
        ahead = row(lambda group: float(group["nesterov"]))
        n = q + ahead * (dd + 2 * m * new + m * m * q - q)
    whole = kl_scale(_sum(rates * n), bound)
    lasting = zip(slopes.params, torch.as_tensor(q, device=like.device).unbind(), strengths, strict=True)
    return Move(
        _plain(scale),
        _plain(whole),
        {p: length for p, length, strength in lasting if strength},
        _plain(whole**2 * _sum(present * n)),
        _plain((scale < 1) | (whole < 1)),
    )


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
        active = move.active.to(torch.int64) if isinstance(move.active, Tensor) else move.active
        return BoundRecord(self.steps + 1, self.told, self.active + active, move.kl)

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
