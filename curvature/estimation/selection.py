"""Which numbers that a model returned a loss sees: all of a tensor, slices, picked rows, or a copy of another dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from curvature.model.backward_hooks import GraphHooks
from curvature.model.graph_nodes import MOVES, below, name_of

#: Nodes of the graph between an output and what a loss sees of it, at most: more are a computation.
_FEW = 32
#: Beginnings of the names of nodes that move numbers. Others, a user's own functions among them, are not run for this.
_MOVES = (*MOVES, "Reshape", "Index", "Gather", "Take", "Masked", "Flip", "Roll", "ToCopy", "AsStrided")
#: Places are told in digits to this base, which every dtype holds exactly.
_BASE = 128


@dataclass(frozen=True)
class SeenPart:
    """Numbers of one of the tensors that a pass returned.

    Attributes:
        place: Which tensor.
        index: ``(m,)`` places in it, in rows of ``width`` numbers; ``None`` for all in their order.
        width: Numbers that stay together.
        shape: Shape in which the loss sees them.
        dtype: And dtype.
    """

    place: int
    index: Tensor | None
    width: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, returned: Sequence[Tensor | None]) -> Tensor:
        """The same numbers of what another pass returned."""
        output = returned[self.place]
        assert output is not None
        rows = output if self.index is None else output.reshape(-1, self.width)[self.index]
        return rows.reshape(self.shape).to(self.dtype)


def selection(returned: Sequence[Tensor | None], z: Tensor) -> SeenPart | None:
    """What ``z`` is of the tensors that a pass returned; ``None`` for anything else than some of their numbers."""
    ends = {t.grad_fn for t in returned if t is not None and t.grad_fn is not None}
    between = set(islice(below([z], ends), _FEW))
    moves = all(node in ends or name_of(node).startswith(_MOVES) for node in between)
    for place, output in enumerate(returned):
        if output is z:
            return SeenPart(place, None, 1, tuple(z.shape), z.dtype)
        if not moves or output is None or output.numel() < z.numel() or output.grad_fn not in between:
            continue
        last = z.shape[-1] if z.dim() and output.dim() and z.shape[-1] == output.shape[-1] else 1
        for width in dict.fromkeys((last, 1)):  # rows of classes, mostly
            index = _places(output, z, width)
            if index is not None:
                return SeenPart(place, index, width, tuple(z.shape), z.dtype)
    return None


def _places(output: Tensor, z: Tensor, width: int) -> Tensor | None:
    """Which rows of an output those of ``z`` are, found by backward passes between them; ``None`` if they are none."""
    number = torch.arange(z.numel() // width, device=z.device)
    found, place = torch.zeros(output.numel() // width, dtype=torch.long, device=z.device), 1
    while place == 1 or place <= len(number):
        digits = (number // place % _BASE + 1).to(z.dtype)  # from one on: zero is where nothing arrives
        with GraphHooks().muted([z]):
            sent = digits.unsqueeze(1).expand(-1, width).reshape(z.shape)
            arrived: Tensor | None = torch.autograd.grad(z, [output], sent, retain_graph=True, allow_unused=True)[0]
        if arrived is None:  # another output of the same operation
            return None
        rows = arrived.reshape(-1, width)
        if not bool((rows == rows[:, :1]).all()):
            return None
        digit = rows[:, 0].round().long()
        found = torch.where(digit > 0, found + (digit - 1) * place, -1)
        place *= _BASE
    index = (found >= 0).nonzero().flatten()
    index = index[found[index].argsort()]
    if not torch.equal(found[index], number):
        return None
    values = output.detach().reshape(-1, width)[index].to(z.dtype)
    return index if torch.equal(values, z.detach().reshape(-1, width)) else None
