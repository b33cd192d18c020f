"""Small parameters of one shape, on which one operation works together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from precond.distributed.sharded import is_sharded

#: Largest number of entries of a tensor that is stacked; in larger ones the numbers outweigh the calls.
SMALL = 2**11


class Alike:
    """Small parameters in groups of one shape, precision and device; all others by themselves.

    The groups are kept until other parameters come.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._found: tuple[list[Tensor], list[list[Tensor]]] = [], []

    def split(self, params: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The parameters that stay by themselves, and the groups of the others."""
        if len(params) != len(self._params) or any(p is not q for p, q in zip(params, self._params, strict=True)):
            found: dict[object, list[Tensor]] = defaultdict(list)
            for i, p in enumerate(params):
                by_itself = p.numel() > SMALL or is_sharded(p)
                found[i if by_itself else (p.shape, p.dtype, p.device)].append(p)
            alone = [p for group in found.values() if len(group) == 1 for p in group]
            self._params, self._found = list(params), (alone, [group for group in found.values() if len(group) > 1])
        return self._found
