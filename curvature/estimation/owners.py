"""Which example each row of a use belongs to, where rows do not lie as the examples do.

Experts take the rows that a router sends them, gates and masks pick some of them, a model may have its positions first.
Weights on the examples, sent back, arrive in every row as the weight of the one example that it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature.layers.samples import OneHot, Outer, PerSample
from curvature.losses.signals import TAG_BASE


def by_row(use: Outer | PerSample) -> Tensor:
    """What arrived in each row under the first signal, ``(m, *)``."""
    if isinstance(use, Outer):
        g = use.g.movedim(-4, 0)[0].flatten(-3, -2)  # (*, m, o)
        return g.movedim(-2, 0).flatten(1)
    return use.gradients[0].flatten(1)


def owners(plain: Tensor, tagged: Sequence[Tensor], examples: int) -> Tensor | None:
    """The example that each row belongs to.

    Args:
        plain: What arrives in the rows, ``(m, d)``.
        tagged: What arrives if the examples are weighted by each set of :meth:`~curvature.losses.signals.Signals.tags`.
        examples: Number of examples.

    Returns:
        ``(m,)``, -1 where nothing arrives; ``None`` if a row hears of several examples.
    """
    if not len(plain):
        return torch.zeros(0, dtype=torch.long, device=plain.device)
    eps = torch.finfo(plain.dtype).eps
    size = torch.linalg.vector_norm(plain, dim=1)
    owner = torch.zeros(len(plain), dtype=torch.long, device=plain.device)
    known = size > 0
    for place, rows in enumerate(tagged):
        grown = torch.linalg.vector_norm(rows, dim=1)
        digit = torch.log2(grown / size).nan_to_num(0, 0, 0).round().clamp(0, TAG_BASE - 1)
        expected = plain * (2.0**digit).unsqueeze(1)
        known &= torch.linalg.vector_norm(rows - expected, dim=1) <= eps**0.5 * grown
        owner += digit.long() * TAG_BASE**place
    known &= owner < examples
    if not bool((known | (size <= eps * size.max())).all()):  # what is left of sums that cancel belongs to nobody
        return None
    return owner.where(known, -1)


@dataclass(frozen=True)
class SortedRows:
    """Rows in the places of their examples.

    Attributes:
        index: ``(n, s)`` which row stands there.
        taken: ``(n, s)`` whether any does.
        owned: Whether it belongs to an example.
        place: ``(m,)`` the n of every row, -1 for those left out.
    """

    index: Tensor
    taken: Tensor
    owned: Tensor
    place: Tensor

    def of(self, use: Outer | PerSample, count_all: bool) -> Outer | PerSample:
        """A use with its rows sorted by examples.

        Args:
            use: The use.
            count_all: Rows that belong to nobody count in averages over the inputs, too.
        """
        if isinstance(use, PerSample):
            gradients, inside = use.gradients, self.place >= 0
            out = gradients.new_zeros(len(gradients), len(self.index), *gradients.shape[2:])
            return replace(use, gradients=out.index_add_(1, self.place[inside], gradients[:, inside]))
        g = self._sorted(use.g.flatten(-3, -2), -2) * self.taken.unsqueeze(-1)
        if isinstance(use.a, OneHot):
            keep = None if use.a.keep is None else self._sorted(use.a.keep.flatten(), 0)
            a: Tensor | OneHot = OneHot(self._sorted(use.a.index.flatten(), 0), use.a.size, keep)
        else:
            a = self._sorted(use.a.flatten(-3, -2), -2) * self.taken.unsqueeze(-1)
        valid = self.taken if count_all or not bool(self.owned.any()) else self.owned
        if use.valid is not None:
            rows = use.valid if len(use.valid) == use.examples else use.valid.any(0)
            valid = valid & self._sorted(rows.flatten(), 0).bool()
        return replace(use, a=a, g=g, valid=None if bool(valid.all()) else valid, serves_all=False)

    def _sorted(self, rows: Tensor, axis: int) -> Tensor:
        """``(*, m, *)`` to ``(*, n, s, *)``."""
        axis = axis % rows.dim()
        if not rows.shape[axis]:
            return rows.new_zeros(*rows.shape[:axis], *self.index.shape, *rows.shape[axis + 1 :])
        return rows.index_select(axis, self.index.flatten()).unflatten(axis, self.index.shape)


def sorted_rows(all_owners: Sequence[Tensor], examples: int, complete: bool) -> list[SortedRows]:
    """The rows of the uses of a block in places of examples that they share.

    Rows that belong to nobody, whose gradients are zero, stand in places of their own behind the others.

    Args:
        all_owners: From :func:`owners`, for each use.
        examples: Number of examples.
        complete: Have a place for every example and for nobody else.
    """
    device = all_owners[0].device
    if complete or len(all_owners) > 1:
        present = torch.arange(examples, device=device)
    else:
        present = all_owners[0][all_owners[0] >= 0].unique()
    widths, numbers = [], []
    for owner in all_owners:
        owned = owner[owner >= 0]
        widths.append(max(1, int(torch.bincount(owned).max()) if len(owned) else 1))
        numbers.append(0 if complete else -(-(len(owner) - len(owned)) // widths[-1]))
    total = max(1, len(present) + max(numbers))
    return [_placed(owner, present, total, width) for owner, width in zip(all_owners, widths, strict=True)]


def _placed(owner: Tensor, present: Tensor, total: int, width: int) -> SortedRows:
    """Rows sorted by owner, those of nobody ``width`` by ``width`` behind them."""
    nobody = owner < 0
    place = torch.searchsorted(present, owner.clamp(min=0))
    rank = nobody.cumsum(0) - 1
    place = torch.where(nobody, len(present) + rank // width, place)
    order = place.argsort(stable=True)
    order = order[place[order] < total]
    sorted_place = place[order]
    first = torch.searchsorted(sorted_place, sorted_place)
    slot = torch.arange(len(order), device=owner.device) - first
    index = torch.zeros(total, width, dtype=torch.long, device=owner.device)
    taken = torch.zeros(total, width, dtype=torch.bool, device=owner.device)
    index[sorted_place, slot], taken[sorted_place, slot] = order, True
    owned = taken & (torch.arange(total, device=owner.device) < len(present)).unsqueeze(1)
    return SortedRows(index, taken, owned, place.where(place < total, -1))
