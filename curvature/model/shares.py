"""Data that are shared out over processes: each has its own, and what is summed over data is summed over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.model.messages import ProcessLost, answered


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
                self._all_reduce(some[0])
                continue
            flat = torch.cat([x.reshape(-1) for x in some])
            self._all_reduce(flat)
            for x, part in zip(some, flat.split([x.numel() for x in some]), strict=True):
                x.copy_(part.reshape(x.shape))

    def _all_reduce(self, x: Tensor) -> None:
        with answered(self.group):
            dist.all_reduce(x, group=self.group)

    def add_up(self, tensors: Mapping[Any, Tensor], device: torch.device) -> dict[Any, Tensor]:
        """Sums by key, where a process may lack some keys: what one lacks is zero. Tensors are not changed.

        Args:
            tensors: Key -> what this process has; keys pickle.
            device: Of the result.
        """
        if not self.several:
            return dict(tensors)
        shapes = self.gather({key: (tuple(x.shape), x.dtype) for key, x in tensors.items()})
        known = {key: what for one in shapes for key, what in one.items()}
        if clashing := [key for one in shapes for key, what in one.items() if known[key] != what]:
            raise ValueError(
                f"{clashing[0]} has another shape or dtype on one rank than on another: the processes have different "
                "models or options."
            )
        out = {}
        for key, (shape, dtype) in known.items():
            own = tensors.get(key)
            zero = torch.zeros(shape, dtype=dtype, device=device)
            out[key] = zero if own is None else zero.copy_(own)
        self.sum(*out.values())
        return out

    def joined(self, rows: Tensor | None, device: torch.device) -> Tensor | None:
        """Rows of all processes one below the other, by rank; ``None`` if nobody has any."""
        found = [x.to(device) for x in self.gather(None if rows is None else rows.cpu()) if x is not None]
        return torch.cat(found) if found else None

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, by rank: small things, that pickle.

        Raises:
            ShareFailed: If a process has raised in :meth:`together` in the meantime.
        """
        return [value] if not self.several else self._gather(value, None)

    def _gather(self, value: Any, failure: str | None) -> list[Any]:
        found: list[Any] = [None] * self.size
        with answered(self.group):
            dist.all_gather_object(found, (value, failure), group=self.group)
        failed = [(rank, words) for rank, (_, words) in enumerate(found) if words is not None]
        if failed and failure is None:
            rank, words = failed[0]
            raise ShareFailed(f"the pass over the data of rank {rank} failed, so that there is no sum: {words}")
        return [one for one, _ in found]

    def first(self, value: Any) -> Any:
        """What the first process gives."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that may raise: if it does in one process, it does in all. One message at the end.

        One such part may hold others. An error that the others have been told of, or that came from them, is not told
        again; any other meets them in the next message that they wait for.

        Raises:
            ShareFailed: If it raised in another process; what it raised in this one is raised as it is.
        """
        try:
            yield
        except Exception as error:
            if self.several and not _was_told(error, self.group):
                error.told = self.group  # type: ignore[attr-defined]  # whatever object of the group meets it next
                self._gather(None, f"{type(error).__name__}: {error}")
            raise
        self.gather(None)

    def same(self, x: Tensor, what: str) -> None:
        """Refuse a tensor that is not the same in all processes.

        Raises:
            ValueError: Naming it.
        """
        if not self.several:
            return
        wide = x.detach().double()
        marks = torch.stack([wide.sum(), wide.abs().sum(), torch.linalg.vector_norm(wide)]).tolist()
        found = self.gather(marks)
        if any(other != found[0] for other in found) and all(isfinite(mark) for one in found for mark in one):
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


def _was_told(error: BaseException | None, group: Any) -> bool:
    """Whether the others know of an error, or of one that it was raised for."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, (ShareFailed, ProcessLost)) or getattr(error, "told", None) is group:
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def summed(shares: Shares, values: Sequence[Tensor | float], device: torch.device) -> list[Tensor]:
    """Numbers, added up over the processes, in float64."""
    out = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    shares.sum(out)
    return list(out)
