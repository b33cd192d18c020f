r"""Control of norms: how far a matrix moves relative to its size, and how its size may change.

With v the parameter after weight decay, u the update (momentum included) and the learning rate :math:`\eta`, a plain
step gives :math:`v - \eta u`. The parts here change u, then the length of the result, in this order:
:class:`RadialBrake`, :class:`UpdateFloor`, :class:`Hyperball`. They act on parameters that are matrices; vectors and
numbers take the plain step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.distributed.sharded import is_sharded, layout_of, local, summed
from precond.step.schedules import Scheduled
from solvers.outcome.arguments import flag, number
from solvers.precision import widen


@dataclass(frozen=True)
class Hyperball:
    r"""Keep the Frobenius norm of each matrix, and make its update relative to it.

    .. math:: W \leftarrow R\, \frac{W - \eta R\, u / \lVert u \rVert}{\lVert W - \eta R\, u / \lVert u \rVert \rVert},
        \qquad R = \lVert W_0 \rVert

    with the norm R that the matrix had before its first step. The learning rate is the length of a step as a part of
    the norm, whatever the method: 0.01 to 0.03 to begin with. It takes the place of weight decay.

    Raises:
        ValueError: In the first step, if a matrix is zero: it would stay so.

    References:
        Wen et al. (2026), section 2, https://arxiv.org/abs/2606.16899
    """

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"hyperball": True}


@dataclass(frozen=True)
class UpdateFloor:
    r"""A floor of the update over the weight: :math:`\lVert u \rVert \ge r \lVert v \rVert`; shorter ones grow to it.

    A step moves a matrix by at least :math:`\eta r` of its norm. An update of zero stays zero.

    Args:
        ratio: r.
        rows: Compare each row (the first axis, which counts outputs) in place of the whole matrix.

    References:
        Track 3 of modded-nanogpt (2026), https://github.com/KellerJordan/modded-nanogpt/pull/274; rows:
        https://github.com/KellerJordan/modded-nanogpt/pull/328
    """

    ratio: Scheduled = 0.35
    rows: bool = False

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not callable(self.ratio):
            number("ratio", self.ratio, low=0)
        flag("rows", self.rows)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"update_floor": self.ratio, "floor_rows": self.rows}


@dataclass(frozen=True)
class RadialBrake:
    r"""Damp the part of the update along the weight, and let the norm change by that part alone.

    .. math:: u \leftarrow u - (1 - c)\, \rho\, v, \qquad \rho = \langle u, v \rangle / \lVert v \rVert^2

    with c = ``outward`` where the step would lengthen the matrix (:math:`\rho < 0`) and ``inward`` where it would
    shorten it; the result then gets the norm :math:`\lVert v \rVert - \eta \langle u, v \rangle / \lVert v \rVert`,
    without what the rest of the update adds in second order. Zero for both keeps the norm.

    Args:
        outward: Part that is left of moves that lengthen.
        inward: Part that is left of moves that shorten.

    References:
        Track 3 of modded-nanogpt (2026), https://github.com/KellerJordan/modded-nanogpt/pull/294; Heo et al. (2020),
        AdamP, https://arxiv.org/abs/2006.08217
    """

    outward: Scheduled = 0.5
    inward: Scheduled = 1.0

    def __post_init__(self) -> None:
        """Validate the arguments."""
        for name in ("outward", "inward"):
            if not callable(value := getattr(self, name)):
                number(name, value, low=0)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"brake_outward": self.outward, "brake_inward": self.inward}


Control = Hyperball | UpdateFloor | RadialBrake
#: What ``norm_control=`` takes.
NormControl = Control | tuple[Control, ...]

#: Entries of a group without any control.
PLAIN: dict[str, Any] = {
    "hyperball": False,
    "update_floor": 0.0,
    "floor_rows": False,
    "brake_outward": 1.0,
    "brake_inward": 1.0,
}


def norm_control_entries(given: Any) -> dict[str, Any]:
    """The entries of a parameter group for ``norm_control=``.

    Raises:
        TypeError: If it is something else.
        ValueError: If a kind of control is there twice.
    """
    parts = () if given is None else given if isinstance(given, (tuple, list)) else (given,)
    wrong = [part for part in parts if not isinstance(part, Control)]
    if wrong:
        raise TypeError(
            "norm_control is Hyperball(), UpdateFloor(ratio) or RadialBrake(outward), a tuple of them, or None for "
            f"none; got {wrong[0]!r}."
        )
    if len({type(part) for part in parts}) < len(parts):
        raise ValueError(f"norm_control has two of a kind: {given}. Give one of each.")
    out = dict(PLAIN)
    for part in parts:
        out |= part.in_groups()
    return out


def check_norm_control(options: dict[str, Any]) -> None:
    """Refuse values out of range, and options that a control overrides.

    Raises:
        ValueError: Naming them.
    """
    for name in ("update_floor", "brake_outward", "brake_inward"):
        if name in options:
            number(name, options[name], low=0)
    hyperball, floor = options.get("hyperball", False), options.get("update_floor", 0.0)
    if (hyperball or floor) and options.get("kl_clip") is not None:
        which = "Hyperball()" if hyperball else "UpdateFloor()"
        raise ValueError(
            f"norm_control={which} sets the length of a matrix's update, so kl_clip={options['kl_clip']} would not "
            "bound it: leave one of them out."
        )
    if hyperball and options["weight_decay"] and options["decay"] not in ("l2", "cautious"):
        raise ValueError(
            f"norm_control=Hyperball() keeps the norm, so {options['decay']} weight decay has no effect on it: leave "
            "weight_decay out, take WeightDecay(strength, 'cautious'), or give vectors a group of their own."
        )
    if hyperball and options.get("stacked"):
        raise ValueError(
            "norm_control=Hyperball() keeps one norm for a parameter, and stacked=True makes it several matrices: give "
            "them a group with norm_control=None."
        )


def is_controlled(group: dict[str, Any]) -> bool:
    """Whether a group has any control."""
    return bool(
        group.get("hyperball", False)
        or group.get("update_floor", 0.0)
        or group.get("brake_outward", 1.0) != 1
        or group.get("brake_inward", 1.0) != 1
    )


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter has two axes, those of length one aside."""
    return p.numel() > max(p.shape, default=1)


def radius(p: Tensor) -> Tensor:
    """The norm that :class:`Hyperball` keeps, 0-d in float32 at least; of a sharded parameter that of all shards.

    Raises:
        ValueError: If it is zero.
    """
    found = _norms([widen(local(p.detach()))], [p], [None])[0].reshape(())
    if not float(found) > 0:  # waits for the device, once
        raise ValueError(
            f"norm_control=Hyperball() keeps the norm of a matrix, and that of shape {tuple(p.shape)} begins at zero, "
            "where it would stay. Give such matrices a group with norm_control=None, or begin elsewhere."
        )
    return found


def controlled_values(
    values: Sequence[Tensor],
    updates: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    group: dict[str, Any],
    of: Sequence[Tensor],
) -> list[Tensor]:
    """The values that matrices are to take.

    Args:
        values: v, parameters after weight decay; of sharded ones the part that lies in this process.
        updates: u, likewise.
        states: State of each; gets its ``radius`` in the first step on the hyperball.
        group: Options.
        of: The parameters themselves, which tell what the parts belong to.

    Returns:
        In the precision of the updates.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor) and lr == 0:
        return list(values)
    axes = [tuple(range(-2, 0)) if group.get("stacked") and p.ndim > 2 else None for p in of]
    v, u = [widen(x) for x in values], [widen(x) for x in updates]
    braked = group["brake_outward"] != 1 or group["brake_inward"] != 1
    targets: list[Tensor] = []
    lengths = _norms(v, of, axes)
    if braked:
        radial = [_ratio(dot, n.square()) for dot, n in zip(_products(u, v, of, axes), lengths, strict=True)]
        outward, inward = (
            [torch.full_like(r, group[name]) for r in radial] for name in ("brake_outward", "brake_inward")
        )
        left = [torch.where(r < 0, a, b) for r, a, b in zip(radial, outward, inward, strict=True)]
        u = [x - (1 - c) * r * y for x, c, r, y in zip(u, left, radial, v, strict=True)]
    if group["update_floor"]:
        within = [_row_axes(p, a) for p, a in zip(of, axes, strict=True)] if group["floor_rows"] else axes
        size = _norms(u, of, within)
        least = [group["update_floor"] * n for n in (_norms(v, of, within) if group["floor_rows"] else lengths)]
        grow = [torch.where(n < r, _ratio(r, n), 1) for n, r in zip(size, least, strict=True)]
        u = [x * torch.where(n > 0, g, 1) for x, n, g in zip(u, size, grow, strict=True)]
    if group["hyperball"]:
        for p, state in zip(of, states, strict=True):
            if "radius" not in state:
                state["radius"] = radius(p)
        targets = [state["radius"].to(x) for state, x in zip(states, v, strict=True)]
        u = [x * _ratio(r, n) for x, r, n in zip(u, targets, _norms(u, of, axes), strict=True)]
    elif braked:
        targets = [n - lr * _ratio(dot, n) for n, dot in zip(lengths, _products(u, v, of, axes), strict=True)]
    moved = [x - lr * y for x, y in zip(v, u, strict=True)]
    if targets:
        reached = _norms(moved, of, axes)
        # A step through the origin has no length to correct.
        factors = [torch.where(t > 0, _ratio(t, n), 1) for t, n in zip(targets, reached, strict=True)]
        moved = [x * factor for x, factor in zip(moved, factors, strict=True)]
    return moved


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, zero where b is."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def _row_axes(p: Tensor, axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes within a row."""
    return (-1,) if axes else tuple(range(1, p.ndim))


def _norms(parts: Sequence[Tensor], of: Sequence[Tensor], axes: Sequence[tuple[int, ...] | None]) -> list[Tensor]:
    """Norms along some axes of each (all for ``None``), which stay as axes of length one; over all shards."""
    found = [torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x, dims in zip(parts, axes, strict=True)]
    if not any(map(is_sharded, of)):
        return found
    return [n.sqrt() for n in _over_shards([n.square() for n in found], of, axes)]


def _products(
    first: Sequence[Tensor], second: Sequence[Tensor], of: Sequence[Tensor], axes: Sequence[tuple[int, ...] | None]
) -> list[Tensor]:
    """Inner products, likewise."""
    found = [
        (a * b).sum(tuple(range(a.ndim)) if dims is None else dims, keepdim=True)
        for a, b, dims in zip(first, second, axes, strict=True)
    ]
    return _over_shards(found, of, axes)


def _over_shards(sums: Iterable[Tensor], of: Sequence[Tensor], axes: Sequence[tuple[int, ...] | None]) -> list[Tensor]:
    """Sums over the processes that share a parameter, where the axis that is cut is summed along; in one message."""
    out, places = list(sums), []
    for i, (p, dims) in enumerate(zip(of, axes, strict=True)):
        if is_sharded(p) and (dims is None or layout_of(p).axis in [d % p.ndim for d in dims]):
            places.append(i)
    for i, total in zip(places, summed([out[i] for i in places], [of[i] for i in places]), strict=True):
        out[i] = total
    return out
