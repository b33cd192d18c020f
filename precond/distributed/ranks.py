"""The processes that train one model together, and what they tell each other."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from curvature.model.messages import ProcessLost, answered
from precond.distributed.triangles import add_up_in_place, tree_sum

#: Numbers in the message that every decision begins with.
MESSAGE = 8

T = TypeVar("T")


class OtherRankFailed(RuntimeError):
    """A part of the step raised in another process, so that it happens in none."""


class Ranks:
    r"""A group of W processes whose gradients are averaged, and the grid in which they share the work.

    Each block of curvature is kept by ``k = fraction * W`` processes. With :math:`R = W / k` the ranks stand in k rows
    of R neighbours; a block belongs to one column, so that each row has all blocks, each of them once.

    Args:
        group: The processes.
        device: Where tensors lie that are sent.
        fraction: Share of the processes that keep each block, from 1 / W to 1.

    Raises:
        ValueError: If the processes cannot be divided so.
    """

    def __init__(self, group: Any, device: torch.device, fraction: float = 1.0) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.copies = copies(fraction, self.size)
        self.columns = self.size // self.copies
        self.column, self.index = self.rank % self.columns, self.rank // self.columns

    @cached_property
    def row(self) -> Any:
        """The neighbours that have all blocks together."""
        return self.group if self.copies == 1 else self._subgroup(range(self.columns), self.index * self.columns)

    @cached_property
    def same_blocks(self) -> Any:
        """The processes that keep the same blocks."""
        return self.group if self.columns == 1 else self._subgroup(range(0, self.size, self.columns), self.column)

    def _subgroup(self, steps: range, start: int) -> Any:
        members = [dist.get_global_rank(self.group, start + step) for step in steps]
        return dist.new_group(members, use_local_synchronization=True)

    # Decisions
    #
    # Every decision begins with one message of the same form, so that a process which fails between two of them can say
    # so (:meth:`tell`) in the place of whichever the others wait for.

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """A few numbers of every process, by rank; all processes give equally many.

        Raises:
            OtherRankFailed: If another process has failed since the last decision.
        """
        return self._decided(values, None)

    def together(self, work: Callable[[], Sequence[float] | None], width: int = 0) -> list[list[float]]:
        """Do a part of the step that may raise: if it raises in one process, it raises in all.

        Args:
            work: Returns ``width`` numbers for the others.
            width: How many.

        Returns:
            The numbers of every process, by rank.

        Raises:
            OtherRankFailed: If it raised in another process; what it raised in this one is raised as it is.
        """
        handled = sys.exc_info()[1]  # of an earlier step, which is tried again while it is handled
        values, error = _attempted(work, width)
        if error is not None and _is_known(error, handled):  # all have left for it
            raise error
        return self._decided(values, error)

    def decide(self, error: BaseException | None) -> None:
        """Go on, unless there is an error in this process or another.

        Raises:
            OtherRankFailed: If another process has failed.
        """
        self._decided((), error)

    def largest(self, work: Callable[[], Sequence[float] | None], width: int) -> list[float]:
        """As :meth:`together`, with the largest of each number over all processes."""
        out = torch.empty(0)

        def attempt() -> None:
            nonlocal out
            out = torch.tensor(work(), dtype=torch.float64, device=self.device)

        self.together(attempt)
        if not width:
            return []
        with answered(self.group):
            dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        found: list[float] = out.tolist()
        return found

    def mean(self, work: Callable[[], Tensor], width: int) -> Tensor:
        """The mean over all processes of the numbers ``(width,)`` that each of them computes, the same bits everywhere.

        Raises:
            OtherRankFailed: If another process failed to compute them.
        """
        own: list[Tensor] = []

        def values() -> list[float]:
            own.append(work())
            found: list[float] = own[0].double().tolist()
            return found

        table = torch.tensor(self.together(values, width), dtype=torch.float64)
        return (tree_sum(list(table)) / self.size).to(own[0])

    def tell(self, error: BaseException, handled: BaseException | None = None) -> None:
        """Let the others, who wait for a decision, know of an error of this process, unless they do already.

        Args:
            error: The error.
            handled: One of before, in whose handling this one was raised, so that it is its context.
        """
        if not _is_known(error, handled):
            with suppress(OtherRankFailed, ProcessLost):
                self._messages((), failed=True)
            error.told = True  # type: ignore[attr-defined]

    def _decided(self, values: Sequence[float], error: BaseException | None) -> list[list[float]]:
        table = self._messages(values, error is not None)
        failed = [rank for rank, row in enumerate(table) if row[0]]
        _raise_for(error, failed[-1] if failed else None)
        return [row[1:] for row in table]

    def _messages(self, values: Sequence[float], failed: bool) -> list[list[float]]:
        """Whether each process failed, and its numbers; of the first message where one did."""
        first = [float(failed), *values][:MESSAGE]
        table = self._gathered([*first, *[0.0] * (MESSAGE - len(first))])
        if len(values) < MESSAGE or any(row[0] for row in table):
            return [row[: 1 + len(values)] for row in table]
        rest = self._gathered(values[MESSAGE - 1 :])
        return [one + other for one, other in zip(table, rest, strict=True)]

    def _gathered(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        out = [torch.empty_like(mine) for _ in range(self.size)]
        with answered(self.group):
            dist.all_gather(out, mine, group=self.group)
        found: list[list[float]] = torch.stack(out).tolist()
        return found

    def objects(self, make: Callable[[], Any]) -> list[Any]:
        """A Python object of every process, by rank: for what changes rarely."""
        own: list[Tensor] = []

        def pickled() -> tuple[float]:
            own.append(torch.frombuffer(bytearray(pickle.dumps(make())), dtype=torch.uint8).to(self.device))
            return (float(own[0].numel()),)

        sizes = [int(size) for (size,) in self.together(pickled, 1)]
        found = self.sent(lambda: gathering_of(self.group, own[0], sizes))
        return [pickle.loads(part.cpu().numpy().tobytes()) for part in found]

    # Tensors
    #
    # What may fail, memory for a message above all, comes before it, and is decided on: a process that has begun to
    # send needs no more memory until all have what they need.

    def sent(self, prepare: Callable[[], Callable[[], T]]) -> T:
        """Send what all are prepared to send.

        Args:
            prepare: Takes the memory of the message, and returns what sends it.

        Raises:
            OtherRankFailed: If another process could not prepare it.
        """
        ready: list[Callable[[], T]] = []
        self.together(lambda: ready.append(prepare()))
        return ready[0]()

    def summing(self, parts: list[Tensor]) -> Callable[[], Tensor]:
        """Prepare the sum over all processes of the part of one's own column, the same bits for everyone who gets it.

        Args:
            parts: One vector for each column; those of a column are equally long everywhere.
        """
        given = parts[0] if len(parts) == 1 else torch.cat(parts)
        in_row = _summing(self.row, given, [len(part) for part in parts], self.column)
        if self.copies == 1:
            return in_row
        # Between those with the same blocks: each adds up a piece of it.
        own = parts[self.column]
        sizes = [len(piece) for piece in own.tensor_split(self.copies)]
        over_rows = _summing(self.same_blocks, own, sizes, self.index)
        back = gathering_of(self.same_blocks, own[: sizes[self.index]], sizes)

        def send() -> Tensor:
            return torch.cat(back(over_rows(in_row())))

        return send


def _attempted(work: Callable[[], Sequence[float] | None], width: int) -> tuple[Sequence[float], BaseException | None]:
    try:
        return work() or (), None
    except BaseException as error:  # an interrupt as well: the others wait for what this process has to say
        return (0.0,) * width, error


def _raise_for(error: BaseException | None, failed: int | None) -> None:
    if error is not None:
        error.told = True  # type: ignore[attr-defined]
        raise error
    if failed is not None:
        raise OtherRankFailed(
            f"the step failed on rank {failed} of the group, so it is taken on no rank; the error there says why. "
            "Nothing has changed here."
        )


def _is_known(error: BaseException | None, handled: BaseException | None) -> bool:
    """Whether the others know of an error, or of one since ``handled`` that it was raised for, or nobody answers."""
    seen: list[BaseException] = []
    while error is not None and error is not handled and error not in seen:
        if isinstance(error, (OtherRankFailed, ProcessLost)) or getattr(error, "told", False):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _summing(group: Any, given: Tensor, sizes: list[int], place: int) -> Callable[..., Tensor]:
    """Prepare the sum of one's own part over a group, in an order that depends on neither the backend nor the sizes.

    Args:
        group: The processes.
        given: The parts of all in a row; what sends them may be given another such vector.
        sizes: Lengths of the parts.
        place: Of one's own.
    """
    mine = sizes[place]
    out = given.new_empty(len(sizes) * mine if len(sizes) > 1 else 0)

    def send(given: Tensor = given) -> Tensor:
        if len(sizes) == 1:
            return given
        with answered(group):
            dist.all_to_all_single(out, given, [mine] * len(sizes), sizes, group=group)
        return add_up_in_place(list(out.split(mine))) if mine else out

    return send


def gathering_of(group: Any, part: Tensor, sizes: list[int]) -> Callable[..., list[Tensor]]:
    """Prepare to gather vectors of these lengths, one from every process of a group.

    Either padded to the longest in one message, or made equally long by another one before it, whichever sends less
    from the process that sends most: :func:`gathering` counts.

    Args:
        group: The processes.
        part: One's own vector; what sends it may be given another one.
        sizes: Lengths of all.
    """
    if len(sizes) == 1:
        return lambda part=part: [part]
    me, everyone, (longest, stays) = dist.get_rank(group), range(len(sizes)), _evened(sizes)
    starts = [0, *accumulate(sizes)]
    given = [_overlap(starts, me, longest, to) for to in everyone] if stays else []
    taken = [_overlap(starts, rank, longest, me) for rank in everyone] if stays else []
    padded, rows = part.new_zeros(longest), part.new_empty(len(sizes), longest)

    def send(part: Tensor = part) -> list[Tensor]:
        if stays:
            with answered(group):
                dist.all_to_all_single(padded[: sum(taken)], part, taken, given, group=group)
        else:
            padded[: len(part)] = part
        if longest:
            with answered(group):
                dist.all_gather(list(rows.unbind()), padded, group=group)
        if stays:
            return list(rows.view(-1)[: sum(sizes)].split(sizes))
        return [row[:size] for row, size in zip(rows.unbind(), sizes, strict=True)]

    return send


def gathering(sizes: list[int]) -> tuple[list[int], int]:
    """Numbers that leave each process in :func:`gathering_of`, and the number of its messages.

    >>> gathering([3, 3, 3]), gathering([0, 9, 0])
    (([6, 6, 6], 1), ([6, 12, 6], 2))
    """
    longest, stays = _evened(sizes)
    sent = (len(sizes) - 1) * longest
    moved = [size - kept for size, kept in zip(sizes, stays, strict=True)] if stays else [0] * len(sizes)
    return [sent + more for more in moved], int(sent > 0) + bool(stays)


def _evened(sizes: list[int]) -> tuple[int, list[int]]:
    """Length of all parts in the last message, and how much each process keeps in a move to equal ones before it.

    The parts are cut anew from all in a row; nothing is moved where that saves nothing, and the list is empty.
    """
    even, starts = -(-sum(sizes) // len(sizes)), [0, *accumulate(sizes)]
    stays = [_overlap(starts, rank, even, rank) for rank in range(len(sizes))]
    most = max(size - kept for size, kept in zip(sizes, stays, strict=True))
    return (even, stays) if (len(sizes) - 1) * (max(sizes) - even) > most else (max(sizes), [])


def _overlap(starts: list[int], rank: int, even: int, to: int) -> int:
    """How many numbers of a part, as it lies in the row of all, are in a part of equal length."""
    return max(0, min(starts[rank + 1], even * (to + 1)) - max(starts[rank], even * to))


def copies(fraction: float, size: int) -> int:
    """How many of ``size`` processes keep each block.

    Raises:
        ValueError: If the fraction is none of ``1 / size, ..., 1``, with a divisor of ``size`` on top.
    """
    allowed = [k for k in range(1, size + 1) if size % k == 0]
    found = next((k for k in allowed if abs(fraction * size - k) < 1e-6 * size), None)
    if found is None:
        choices = ", ".join(str(Fraction(k, size)) for k in allowed)
        raise ValueError(f"memory_fraction={fraction} does not divide {size} processes; with so many it is {choices}.")
    return found


def check_fraction(fraction: Any) -> float:
    """Refuse a ``memory_fraction`` that fits no number of processes."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(
            f"memory_fraction is the share of processes that keep each block, in (0, 1]; got {fraction!r}."
        )
    return float(fraction)


def check_group(group: Any) -> Any:
    """The process group that ``process_group=`` means; a mesh of one dimension stands for its group."""
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("process_group= needs torch.distributed.init_process_group() first.")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"process_group takes a mesh of one dimension; this one has {group.ndim}: {group}.")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a torch.distributed.ProcessGroup such as torch.distributed.group.WORLD, not {group!r}."
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of the process_group it was given.")
    return group


def group_of(given: Any, parallel: nn.parallel.DistributedDataParallel | None) -> Any:
    """Who belongs together: ``process_group=``, else those over whom DDP averages; ``None`` for one process.

    Raises:
        ValueError: If both are known and differ.
    """
    averaged = None if parallel is None else parallel.process_group
    if parallel is not None and parallel._join_config.enable:
        raise NotImplementedError(
            "DistributedDataParallel.join() lets ranks without data stay away, and layer-based methods need all in "
            "each step. Give every rank equally many batches, such as by DistributedSampler."
        )
    if given is not None and averaged is not None:
        ranks = dist.get_process_group_ranks(given)
        others = dist.get_process_group_ranks(averaged)
        if ranks != others:
            raise ValueError(
                f"process_group holds ranks {ranks}, but DistributedDataParallel averages gradients over {others}. "
                "Leave process_group out: the group of a wrapped model is found."
            )
    found = averaged if given is None else given
    return None if found is None or dist.get_world_size(found) == 1 else found


def world_rank() -> int:
    """Rank among all processes of the run."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_rank() if ready else 0
