"""Data that are shared out over processes: each has its own, and what is summed over data is summed over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ShareFailed(RuntimeError):
    """A pass over the data raised in another process, so that none has the sum."""


class Shares:
    """The processes whose data together are the data; all of them make the same calls.

    Args:
        group: A process group of ``torch.distributed``; ``None`` where the data are all here.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def sum(self, *tensors: Tensor) -> None:
        """Add up tensors over the processes, in place; one message for each dtype.

        The sum has the same bits in all processes.
        """
        if not self.several:
            return
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            some = [x for x in tensors if x.dtype == dtype]
            if len(some) == 1 and some[0].is_contiguous():
                dist.all_reduce(some[0], group=self.group)
                continue
            flat = torch.cat([x.reshape(-1) for x in some])
            dist.all_reduce(flat, group=self.group)
            for x, part in zip(some, flat.split([x.numel() for x in some]), strict=True):
                x.copy_(part.reshape(x.shape))

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, by rank: small things, that pickle."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that may raise: if it does in one process, it does in all. One message at the end.

        Raises:
            ShareFailed: If it raised in another process; what it raised in this one is raised as it is.
        """
        try:
            yield
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}" if self.several else None)
            raise
        failed = [(rank, words) for rank, words in enumerate(self.gather(None)) if words is not None]
        if failed:
            rank, words = failed[0]
            raise ShareFailed(f"the pass over the data of rank {rank} failed, so that there is no sum: {words}")

    def same(self, x: Tensor, what: str) -> None:
        """Refuse a tensor that is not the same in all processes.

        Raises:
            ValueError: Naming it.
        """
        if not self.several:
            return
        wide = x.detach().double()
        marks = torch.stack([wide.sum(), wide.abs().sum(), torch.linalg.vector_norm(wide)])
        high = torch.cat([marks, -marks])
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        if not torch.equal(high[:3], -high[3:]) and bool(torch.isfinite(high).all()):
            raise ValueError(
                f"{what} is not the same in all {self.size} processes. They work on one matrix, so they must do the "
                "same with it: draw vectors from generators with the same seed, and load the same model everywhere."
            )

    def draws(self, generator: torch.Generator) -> torch.Generator:
        """A source of draws for the data of this process, from one that is the same in all processes.

        With one process it is that one. The draws of several are independent of each other, and others than those of
        one process on the same data.
        """
        if not self.several:
            return generator
        seed = torch.randint(1 << 62, (), generator=generator, device=generator.device)
        return torch.Generator(device=generator.device).manual_seed(int(seed) + self.rank)


def summed(shares: Shares, values: Sequence[Tensor | float], device: torch.device) -> list[Tensor]:
    """Numbers, added up over the processes, in float64."""
    out = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    shares.sum(out)
    return list(out)
