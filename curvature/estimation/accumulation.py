"""Sums over a long data set, kept in a file from which they go on at the right batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvature.estimation.checkpoint import Checkpoint, digest
from curvature.model.data import Batch, tensors_in
from curvature.model.parameters import Parameters
from curvature.model.settings import random_state, set_random_state


class Sums(Protocol):
    """What batches are taken into."""

    parameters: Parameters

    def state(self) -> dict[str, Any]:
        """Everything that the next batch depends on, as tensors, numbers and strings."""
        ...

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up :meth:`state`."""
        ...


class Accumulation:
    """How far the sums over a data set have come.

    With a file, a run goes on where an earlier one was killed, with its random numbers and buffers. Batches that were
    taken in before are read again but not evaluated, and must be the same ones, bit for bit.

    Args:
        model: The model; its buffers may change while it runs.
        collector: The sums: a collector, or anything else that batches are taken into.
        generator: Source of the draws.
        passes: Passes over the data after which all is done, at most.
        file: Where to keep all this; ``None`` keeps nothing.

    Attributes:
        total: Sum of what the batches bring to the divisor of the loss.
        number: Passes over the data that are done.
    """

    def __init__(
        self,
        model: nn.Module,
        collector: Sums,
        generator: torch.Generator,
        passes: int,
        file: Checkpoint | None,
    ) -> None:
        self.model, self.collector, self.generator, self.passes, self.file = model, collector, generator, passes, file
        self.device = collector.parameters.device
        self.total: Tensor | float = 0.0
        self.number = 0
        self._complete = False  # that is what the file held
        self._count = 0  # batches taken in since then
        self._seen = ""  # hash of the batches taken in during the pass that is on, or was the last
        self._began: list[Tensor] = []  # random state when that pass began; a loader may draw its order from it
        self._random: list[Tensor] = []  # random state after the last batch that the file knows of

    def resume(self, reasons: Iterable[str] = ()) -> None:
        """Take up what the file holds, if it exists.

        Args:
            reasons: Parameters that are taken by autograd from the first batch on; sums without these are of no use.

        Raises:
            CheckpointError: If the file belongs to another computation.
        """
        saved = None if self.file is None else self.file.load()
        if saved is None or not set(reasons) <= set(saved["collector"].get("plan", {}).get("generic", reasons)):
            return
        self.number, self._count, self._seen = saved["number"], saved["count"], saved["seen"]
        self._began, self._random = saved["began"], saved["random"]
        self._complete = self.number == self.passes
        self.total = saved["total"]
        if isinstance(self.total, Tensor):
            self.total = self.total.to(self.device)
        self.collector.restore(saved["collector"])
        self.generator.set_state(saved["generator"])
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(saved["buffers"][name])

    def state(self) -> dict[str, Any]:
        """Everything that the next batch depends on."""
        return {
            "number": self.number,
            "count": self._count,
            "seen": self._seen,
            "began": self._began,
            "random": random_state(self.device),
            "total": self.total,
            "collector": self.collector.state(),
            "generator": self.generator.get_state(),
            "buffers": {name: buffer.detach() for name, buffer in self.model.named_buffers()},
        }

    def batches(self, start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
        """The batches of a pass that are still to be taken in; one counts when the next is asked for.

        Args:
            start: Starts a pass over the data.

        Raises:
            CheckpointError: If those taken in before are others now.
        """
        if self.file is None:
            yield from start()
            return
        before, expected = self._count, self._seen
        if before:
            set_random_state(self._began, self.device)
        else:
            self._began = random_state(self.device)
        seen, index = "", 0
        for index, batch in enumerate(start(), 1):
            seen = digest(tensors_in(batch), seen)
            if index < before:
                continue
            if index == before:
                self._require(seen == expected)
                set_random_state(self._random, self.device)
                continue
            yield batch
            self._count, self._seen = index, seen
            self.file.offer(self.state)
        self._require(index >= before)

    def end_pass(self) -> None:
        """All batches of a pass were taken in."""
        self.number += 1
        self._count = 0

    def finish(self, start: Callable[[], Iterator[Batch]]) -> None:
        """Keep the sums; if the file had all of them, compare the data with those they are of.

        Args:
            start: Starts a pass over the data.

        Raises:
            CheckpointError: If the file had the sums of other data.
        """
        if self.file is None:
            return
        if not self._complete:
            self.number = self.passes
            self.file.save(self.state())
            return
        set_random_state(self._began, self.device)
        seen = ""
        for batch in start():
            seen = digest(tensors_in(batch), seen)
        self._require(seen == self._seen)

    def _require(self, same_data: bool) -> None:
        if not same_data:
            assert self.file is not None
            self.file.refuse({"data": ("other batches", "these")})
