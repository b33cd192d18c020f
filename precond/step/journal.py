"""What steps were like, for loggers: measured where somebody asks, counted at events that are rare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from precond.distributed.sharded import any_sharded, local, summed
from solvers.precision import working_dtype

#: Names of the counts.
REFRESHES, FAILURES = "refreshes", "failures"


def lengths(moves: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The norm of each difference ``after - before``, 0-d and on its device; nobody waits for it.

    Args:
        moves: Pairs of values, after and before.
    """
    moves = list(moves)
    if any_sharded(after for after, _ in moves):
        return [_length_over_shards(moves)]
    # Values round to the precision of what they are written into.
    rounded = [(after.to(before.dtype), before) for after, before in moves if after.numel()]
    pairs = [(after.to(dtype := working_dtype(before)), before.to(dtype)) for after, before in rounded]
    if not pairs:
        return []
    return list(torch._foreach_norm(torch._foreach_sub([after for after, _ in pairs], [before for _, before in pairs])))


def _length_over_shards(moves: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The norm of all differences, of whose tensors each process has a part; every process calls it."""
    device = local(moves[0][0]).device
    squares = []
    for after, before in moves:
        found = lengths([(local(after), local(before))])  # none of a shard without entries
        squares.append(found[0].double().square() if found else torch.zeros((), dtype=torch.float64, device=device))
    return torch.stack(summed(squares, [after for after, _ in moves])).sum().sqrt()


def norm(parts: Iterable[Tensor]) -> float:
    """The norm of a vector, from those of its parts."""
    return sum(float(part) ** 2 for part in parts) ** 0.5


def shares(noted: Mapping[str, list[tuple[Tensor, int]]]) -> dict[str, float]:
    """Shares of what was counted: the sum of the hits over that of the numbers."""
    return {
        name: sum(float(hits) for hits, _ in found) / max(1, sum(number for _, number in found))
        for name, found in noted.items()
    }
