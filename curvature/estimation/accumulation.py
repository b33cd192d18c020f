"""Sums over a long data set, kept in a file from which they go on at the right batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvature.estimation.checkpoint import Checkpoint, digest
from curvature.estimation.probe import Sketches, different, sketches
from curvature.losses import Terms
from curvature.model.data import Batch, to_device
from curvature.model.determinism import seeded
from curvature.model.parameters import Parameters
from curvature.model.settings import settings
from curvature.model.streams import random_state, set_random_state
from curvature.model.trees import tensors_in
from curvature.model.wrappers import plain_checkpoints


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
    taken in before are read again and must be the same ones, bit for bit. The first and the last of them are evaluated
    once more, to see that the model and the loss compute what they did; the others are not.

    Args:
        model: The model; its buffers may change while it runs.
        collector: The sums: a collector, or anything else that batches are taken into.
        generator: Source of the draws.
        passes: Passes over the data after which all is done, at most.
        file: Where to keep all this; ``None`` keeps nothing.
        look: The loss of a batch, attached to the graph; needed with a file.
        also: Makes further sketches that a later run must agree with.

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
        look: Callable[[Any, Any], Terms] | None = None,
        also: Callable[[], dict[str, Sketches]] = dict,
    ) -> None:
        self.model, self.collector, self.generator, self.passes, self.file = model, collector, generator, passes, file
        self.device = collector.parameters.device
        self.total: Tensor | float = 0.0
        self.number = 0
        self._complete = False  # that is what the file held
        self._count = 0  # batches taken in since then
        self._seen = ""  # hash of the batches taken in during the pass that is on, or was the last
        self._began: list[Tensor] = []  # random state when a pass begins; a loader may draw its order from it
        self._random: list[Tensor] = []  # random state after the last batch that the file knows of
        self._look, self._also = look, cache(also)
        self._start = {} if file is None else {name: b.detach().clone() for name, b in model.named_buffers()}
        self._seen_at: dict[str, Sketches] = {}  # what the first and the last of these batches showed
        self._expected: dict[str, Sketches] = {}  # the same, in the file
        self._last: Batch | None = None

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
        # Files of version 0.1 say nothing of what was computed.
        self._expected = saved.get("probe", {})
        if self._expected:
            self._compare(self._also(), self._expected)
        self._seen_at = {name: found for name, found in self._expected.items() if name == "first batch"}
        self.number, self._count, self._seen = saved["number"], saved["count"], saved["seen"]
        self._began, self._random = saved["began"], saved["random"]
        self._complete = self.number == self.passes
        self.total = saved["total"]
        if isinstance(self.total, Tensor):
            self.total = self.total.to(self.device)
        self.collector.restore(saved["collector"])
        self.generator.set_state(saved["generator"])
        write_buffers(self.model, saved["buffers"])

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
            "probe": self._probe(),
        }

    def batches(self, start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
        """The batches of a pass that are still to be taken in; one counts when the next is asked for.

        Every pass begins with the random numbers of the first, so that a model that draws (dropout, noise in
        ``forward``) is one function for all of them.

        Args:
            start: Starts a pass over the data.

        Raises:
            CheckpointError: If those taken in before are others now.
        """
        if self._began:
            set_random_state(self._began, self.device)
        else:
            self._began = random_state(self.device)
        if self.file is None:
            yield from start()
            return
        before, expected = self._count, self._seen
        seen, index, first = "", 0, None
        for index, batch in enumerate(start(), 1):
            seen = digest(tensors_in(batch), seen)
            first = batch if index == 1 else first
            if index == 1 and not before:
                self._seen_at["first batch"] = self._sketches(batch)
            if index < before:
                continue
            if index == before:
                self._require(seen == expected)
                self._recognise(first, batch)
                set_random_state(self._random, self.device)
                continue
            yield batch
            self._count, self._seen, self._last = index, seen, batch
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
        seen, first, batch = "", None, None
        for index, batch in enumerate(start(), 1):
            seen = digest(tensors_in(batch), seen)
            first = batch if index == 1 else first
        self._require(seen == self._seen)
        self._recognise(first, batch)

    def _sketches(self, batch: Batch) -> Sketches:
        """What is computed on a batch: at the buffers with which the run began, and with random numbers of its own."""
        assert self._look is not None
        with settings(self.model, seeded(0, self.device), self.device), plain_checkpoints():
            write_buffers(self.model, self._start)
            x, y = (to_device(part, self.device) for part in batch)
            with torch.enable_grad():
                return sketches(self._look(x, y), self.collector.parameters)

    def _probe(self) -> dict[str, Sketches]:
        """What the file tells a later run about the function."""
        if self._last is not None:
            self._seen_at["last batch"] = self._sketches(self._last)
        return self._also() | self._seen_at

    def _recognise(self, first: Batch | None, last: Batch | None) -> None:
        """Refuse a file whose run saw another function on these batches, the first and the last it took in."""
        for where, batch in (("first batch", first), ("last batch", last)):
            if batch is not None and where in self._expected:
                self._compare({where: self._sketches(batch)}, self._expected)

    def _compare(self, found: Mapping[str, Sketches], expected: Mapping[str, Sketches]) -> None:
        assert self.file is not None
        self.file.refuse(
            {
                f"{name} on the {where}": ("another function", "this")
                for where, new in found.items()
                if where in expected
                for name in different(expected[where], new)
            }
        )

    def _require(self, same_data: bool) -> None:
        if not same_data:
            assert self.file is not None
            self.file.refuse({"data": ("other batches", "these")})


def write_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set buffers to values, except those that were made or grown in between."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])
