"""State of blocks that each process keeps of sharded parameters, the rows that it holds: ``shards="local"``.

The blocks of a parameter differ in shape, and so do the names and shapes of their matrices. A checkpoint has a table
for each parameter, laid out as a ``DTensor``: one row for each process, with all tensors of its block one after the
other, padded to the longest row. The numbers of all blocks are in all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.distributed.exchange import COMMON, cut_as
from precond.distributed.sharded import is_sharded, layout_of, like, ranks_of

Entries = dict[str, Any]

#: Entry of a saved state: the table.
TABLE = "shards"
#: Entry of a saved state: how the parameter was cut (:func:`cut_of`), and the numbers of each process.
HELD = "held"


def is_cut(p: Any) -> bool:
    """Whether several processes share a tensor, each with a part of its own."""
    return is_sharded(p) and layout_of(p).group is not None


def cut_of(p: Any) -> list[int]:
    """How a parameter is cut: the axis, and the number of rows in each process; empty if it is not."""
    if not is_cut(p):
        return []
    layout = layout_of(p)
    return [layout.axis, *(shape[layout.axis] for shape in layout.shards())]


def table(p: Any, first: Callable[[Tensor], Mapping[str, Any]]) -> Tensor:
    """The table of a parameter, ``(processes, longest)``, on the meta device.

    Args:
        p: The parameter.
        first: What a block of some shape, on the meta device, begins with.
    """
    shapes = layout_of(p).shards()
    rows = [first(torch.empty(shape, dtype=p.dtype, device="meta")) for shape in dict.fromkeys(shapes)]
    longest = max(sum(x.numel() for x in row.values() if isinstance(x, Tensor)) for row in rows)
    return torch.empty(len(shapes), longest, dtype=torch.promote_types(p.dtype, torch.float32), device="meta")


def saved(
    states: Mapping[Tensor, Entries], first: Mapping[Tensor, Entries], shapes: Mapping[Tensor, Tensor]
) -> dict[Tensor, Entries]:
    """States in the form of a checkpoint; every process calls it.

    Args:
        states: Parameter -> what this process keeps of it.
        first: Parameter -> what the block of this process begins with.
        shapes: Parameter -> its :func:`table`.
    """
    order = list(states)
    others: dict[Tensor, list[Entries]] = {p: [{} for _ in cut_of(p)[1:]] for p in order}
    for ranks in ranks_of(order):
        mine = [(i, p) for i, p in enumerate(order) if ranks in ranks_of([p])]

        def own(mine: list[tuple[int, Tensor]] = mine) -> dict[int, tuple[int, Entries]]:
            return {i: (dist.get_rank(layout_of(p).group), _others(states[p], first[p])) for i, p in mine}

        for one in ranks.objects(own):
            for i, (place, found) in one.items():
                others[order[i]][place] = found
    out: dict[Tensor, Entries] = {}
    for p in order:
        state, shape, start = states[p], shapes[p], 0
        row = torch.zeros(shape.shape[1], dtype=shape.dtype, device=p.device)
        for name, x in _tensors(first[p]).items():
            row[start : start + x.numel()] = state[name].reshape(-1)
            start += x.numel()
        laid = {name: x for name, x in state.items() if is_sharded(x) or name in COMMON}
        tail = {TABLE: like(row[None], p, 0, tuple(shape.shape)), HELD: {"cut": cut_of(p), "numbers": others[p]}}
        out[p] = {**laid, **tail}
    return out


def kept(p: Tensor, entries: Entries, first: Mapping[str, Any]) -> Entries:
    """What of a saved state this process keeps; every process calls it.

    Args:
        p: The parameter.
        entries: Those of :func:`saved`.
        first: What the block of this process begins with.
    """
    place, out = dist.get_rank(layout_of(p).group), Entries()
    for name, x in entries.items():
        if name == HELD:
            out |= x["numbers"][place]
        elif name == TABLE:
            row, start = (x.to_local()[0] if is_sharded(x) else x[place]), 0
            for key, like_it in _tensors(first).items():
                part = row[start : start + like_it.numel()].reshape(like_it.shape)
                out[key] = part.to(like_it.dtype, copy=True)
                start += like_it.numel()
        else:
            out |= {name: x} if name in COMMON else cut_as(p, {name: x})
    return out


def _tensors(first: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a block."""
    return {name: x for name, x in first.items() if isinstance(x, Tensor) and not is_sharded(x)}


def _others(state: Mapping[str, Any], first: Mapping[str, Any]) -> Entries:
    """What else there is of a block: numbers."""
    known = {TABLE, *COMMON, *_tensors(first)}
    return {name: x for name, x in state.items() if name not in known and not is_sharded(x)}


def require_same_cut(p: Any, entries: Mapping[str, Any], ways: tuple[str, str], whose: str) -> None:
    """Refuse a state whose matrices are of other blocks than the processes hold now.

    Args:
        p: The parameter.
        entries: Its saved state.
        ways: Option ``shards`` of the optimizer, and of the state.
        whose: The beginning of the message.

    Raises:
        ValueError: Saying how it was cut, and how it is.
    """
    now = cut_of(p)
    if now and ways[0] != ways[1]:
        raise ValueError(
            f"{whose} saved with shards={ways[1]!r}, and the optimizer has shards={ways[0]!r}: its matrices are of "
            f"other shapes. Make the optimizer with shards={ways[1]!r}, or begin without a state, from the weights "
            "alone."
        )
    if not entries:
        return
    before = entries[HELD]["cut"] if HELD in entries else []
    if before != (now if ways[1] == "local" else []):
        raise ValueError(
            f"{whose} {_said(before)}, and is now {_said(now)}: with shards='local' matrices belong to the rows that a "
            "process holds. Load it on as many processes, sharded in the same way; or begin without a state, from the "
            "weights alone."
        )


def _said(cut: list[int]) -> str:
    return f"cut along axis {cut[0]} into {', '.join(map(str, cut[1:]))}" if cut else "whole"
