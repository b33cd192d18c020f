"""The messages between the parts of parameters and their owners: what is sent, how it is cut, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.model.messages import answered
from precond.distributed.sharded import ShardLayout, layout_of


@dataclass
class Message:
    """An ``all_to_all`` whose memory is taken before it is sent.

    Attributes:
        group: The processes.
        given: What is sent, by rank.
        got: What is received, by rank.
        into: How many numbers go to each rank.
        of: How many come from each.
    """

    group: Any
    given: Tensor
    got: Tensor
    into: list[int]
    of: list[int]
    _work: Any = None

    def begin(self) -> None:
        """Send it, and go on."""
        with answered(self.group):
            self._work = dist.all_to_all_single(
                self.got, self.given, self.of, self.into, group=self.group, async_op=True
            )

    def wait(self) -> None:
        """Until it is here, as far as work that follows on the device is concerned."""
        with answered(self.group):
            if self._work is not None:
                self._work.wait()
        self._work = None


@dataclass
class Gather:
    """Shards of tensors that have the shapes of parameters, on their way to the owners.

    Attributes:
        message: What is sent.
        layouts: Parameter -> how it is cut, of those kept here.
    """

    message: Message
    layouts: dict[Tensor, ShardLayout]

    @classmethod
    def of(cls, owner: Mapping[Tensor, int], shards: Mapping[Tensor, Tensor], group: Any, dtype: torch.dtype) -> Gather:
        """That of some shards of one group, in a precision."""
        me, size = dist.get_rank(group), dist.get_world_size(group)
        layouts = {p: layout_of(p) for p in shards}
        sent = [shards[p].reshape(-1) for rank in range(size) for p in shards if owner[p] == rank]
        into = [sum(prod(layouts[p].piece(me)) for p in shards if owner[p] == rank) for rank in range(size)]
        mine = {p: layouts[p] for p in shards if owner[p] == me}
        of = [sum(prod(layout.piece(rank)) for layout in mine.values()) for rank in range(size)]
        given = torch.cat([x.detach().to(dtype) for x in sent])
        return cls(Message(group, given, given.new_empty(sum(of)), into, of), mine)

    def wholes(self) -> dict[Tensor, Tensor]:
        """Whole tensors of the parameters kept here, once the message has come; it is forgotten."""
        parts: dict[Tensor, list[Tensor]] = {p: [] for p in self.layouts}
        for rank, received in enumerate(self.message.got.split(self.message.of)):
            shapes = [layout.piece(rank) for layout in self.layouts.values()]
            pieces_of = received.split([prod(shape) for shape in shapes])
            for p, shape, part in zip(self.layouts, shapes, pieces_of, strict=True):
                parts[p].append(part.reshape(shape))
        out = {p: torch.cat(found, self.layouts[p].axis) for p, found in parts.items()}
        self.message.given = self.message.got = self.message.given.new_empty(0)
        return out


@dataclass
class Spread:
    """Whole tensors on their way from the owners to everybody's shards.

    Attributes:
        message: What is sent.
        layouts: Key -> how its tensor is cut, those of a lower owner first.
        mine: Keys of the tensors that are sent from here.
    """

    message: Message
    layouts: dict[Any, ShardLayout]
    mine: list[Any] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        owner: Mapping[Tensor, int],
        layouts: Mapping[Any, ShardLayout],
        group: Any,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Spread:
        """That of tensors of one group, in a precision; what is sent is to be filled in."""
        me, size = dist.get_rank(group), dist.get_world_size(group)
        by_rank = [[key for key in layouts if owner[parameter_of(key)] == rank] for rank in range(size)]
        into = [sum(prod(layouts[key].piece(rank)) for key in by_rank[me]) for rank in range(size)]
        of = [sum(prod(layouts[key].piece(me)) for key in some) for some in by_rank]
        given, got = (torch.empty(sum(sizes), dtype=dtype, device=device) for sizes in (into, of))
        ordered = {key: layouts[key] for some in by_rank for key in some}
        return cls(Message(group, given, got, into, of), ordered, by_rank[me])

    def fill(self, wholes: Mapping[Any, Tensor]) -> None:
        """Put the tensors that lie here into what is sent."""
        start = 0
        cuts = {key: self.layouts[key].cut(wholes[key].detach()) for key in self.mine}
        for rank in range(len(self.message.into)):
            for key in self.mine:
                part = cuts[key][rank]
                self.message.given[start : start + part.numel()].view(part.shape).copy_(part)
                start += part.numel()

    def parts(self) -> dict[Any, Tensor]:
        """The shards of this process, once the message has come."""
        me = dist.get_rank(self.message.group)
        shapes = [layout.piece(me) for layout in self.layouts.values()]
        found = self.message.got.split([prod(shape) for shape in shapes])
        return {key: part.reshape(shape) for key, part, shape in zip(self.layouts, found, shapes, strict=True)}


def parameter_of(key: Any) -> Tensor:
    """The parameter of a key: itself, or of it and a name."""
    found: Tensor = key[0] if isinstance(key, tuple) else key
    return found
