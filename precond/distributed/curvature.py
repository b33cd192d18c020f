"""The curvature of a layer-based optimizer in several processes: what its step does together with the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from curvature.model.data import to_device
from precond.distributed.agreement import Host, SharedPlan
from precond.distributed.assignment import assigned, cost
from precond.distributed.kept_blocks import Kept, Published, Refreshing
from precond.distributed.ranks import Ranks, gathering_of
from precond.distributed.reduction import Item, Piece, add_up, spread
from precond.distributed.sharded import local
from solvers import SolverError


class SharedCurvature:
    """Adds statistics up over processes, and shares out what follows from them.

    Every method is called in all processes at the same point of the step.

    Args:
        ranks: The processes.
        whole: Whether whatever belongs to one parameter is kept by one process, which gets its whole gradient.
    """

    def __init__(self, ranks: Ranks, whole: bool = False) -> None:
        self.ranks, self.whole = ranks, whole
        self.plan = SharedPlan()
        self._columns: dict[str, int] = {}  # block -> column that keeps it
        self._costs: dict[str, int] = {}
        self._published: dict[str, list[Published]] = {}  # block -> what it publishes
        self._reached: set[str] = set()  # blocks that the step has statistics of, in some process
        self._weight = 0.0  # that the sums of the step are divided by

    def keeps(self, name: str) -> bool:
        """Whether this process keeps a block; all keep those that were loaded until statistics come in."""
        return self._columns.get(name, self.ranks.column) == self.ranks.column

    def counts(self, name: str) -> bool:
        """Whether this process is the one among its neighbours that counts a block."""
        return self._columns.get(name, 0) == self.ranks.column

    # Statistics

    def finish(self, host: Host, gradients: Mapping[str, Tensor], scale: Tensor | float) -> int:
        """Close the step and add its sums up, block by block.

        Args:
            host: The optimizer.
            gradients: Gradients of the step by name.
            scale: Of a GradScaler in them.

        Returns:
            Calls of the loss that count, in all processes.
        """
        if self.whole:
            gradients = self._told(host, gradients)
        self._find_hidden(host, gradients)
        batches, self._weight = self._agreed(host, scale)
        if batches:
            self._reached = self._add_up(host, weighs=True)
            self._reached |= {name for name, block in host.preconditioners.items() if block.estimator.sums_late}
            kept = {name for name in self._reached if self.keeps(name)}
            host.statistics.settle(self._weight, kept & host.statistics.collector.estimators.keys())
        return batches

    def again(self, host: Host, scale: Tensor | float) -> bool:
        """Add up what a second pass has brought; whether there was anything."""
        found, self._weight = self._agreed(host, scale)
        if found:
            reached = self._add_up(host, weighs=True)
            host.statistics.settle(self._weight, reached & host.statistics.collector.estimators.keys())
        return found > 0

    def _told(self, host: Host, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the place of shards, numbers that are zero where a gradient is zero in all processes."""
        names = list(host.parameters)
        written = [host.parameters[name].grad for name in names]  # as it stands there; others hold L2 decay, say
        both = [*written, *(gradients.get(name) for name in names)]
        mask = self.ranks.largest(lambda: _nonzero(both), len(both))
        host.statistics.tape.nonzero = frozenset(name for name, found in zip(names, mask, strict=False) if found)
        own = zip(names, mask[len(names) :], strict=True)
        return {name: torch.tensor(found) for name, found in own if name in gradients}

    def _find_hidden(self, host: Host, gradients: Mapping[str, Tensor]) -> None:
        """Repeat passes that hide parameters; a gradient may also come from another process alone."""
        statistics, missing = host.statistics, set[str]()

        def close() -> tuple[float]:
            missing.update(statistics.close(gradients))
            return (float(len(missing)),)

        if any(row[0] for row in self.ranks.together(close, 1)):
            names = list(host.parameters)
            own = statistics.explained
            mask = self.ranks.largest(lambda: [float(name in own) for name in names], len(names))
            elsewhere = {name for name, found in zip(names, mask, strict=True) if found}
            here = {name: g for name, g in gradients.items() if name not in elsewhere}
            self.ranks.together(lambda: statistics.look_again(missing - elsewhere, here))

    def _agreed(self, host: Host, scale: Tensor | float) -> tuple[int, float]:
        """Calls of the loss in all processes, and the weight of the step; all know all blocks then.

        The gradient is the mean over processes, so a mean over W of them weighs W, also where one has no data; sums
        weigh as many terms as there are.

        Raises:
            ValueError: If some losses are sums and others means.
        """
        statistics = host.statistics

        def own() -> tuple[float, ...]:
            weight, adds_up = statistics.divisor(scale) if statistics.batches else (0.0, False)
            value = statistics.loss_sum()
            tells = (0.0, 0.0) if value is None else (1.0, float(value))
            return float(self.plan.is_news(host)), float(statistics.batches), float(weight), float(adds_up), *tells

        table = self.ranks.together(own, 6)
        while any(row[0] for row in table):
            self.plan.exchange(self.ranks, host)
            table = self.ranks.together(own, 6)
        seen = [row for row in table if row[1]]
        if len({row[3] for row in seen}) > 1:
            raise ValueError(
                "the losses are sums on some ranks and means on others, so their curvatures have no common scale. Use "
                "one reduction on all."
            )
        total = sum(row[2] for row in seen)
        if seen and not seen[0][3]:
            total *= len(table) / len(seen)
        values = [row[5] for row in table if row[4]]
        statistics.level = torch.tensor(sum(values) / total, dtype=torch.float64) if values and total else None
        return int(sum(row[1] for row in table)), total

    def _add_up(self, host: Host, weighs: bool, only: Iterable[str] | None = None) -> set[str]:
        """Add the sums of the step over processes; returns the blocks that some process has reached.

        Args:
            host: The optimizer.
            weighs: Whether the weights of the sums add up as well, rather than being those of the step.
            only: Of these blocks.
        """
        chosen = self.plan.blocks.keys() if only is None else set(only)
        sums = [
            (name, path) for name, block in self.plan.blocks.items() if name in chosen for path in sorted(block.sums)
        ]
        means = {key: host.preconditioners[key[0]].estimator.step_mean(key[1]) for key in sums}
        mask = self.ranks.largest(lambda: [float(means[key].pending) for key in sums], len(sums))
        reached = [key for key, found in zip(sums, mask, strict=True) if found]
        self._assign()
        items = []
        for name, path in reached:
            shape, dtype, symmetric = self.plan.blocks[name].sums[path]
            items.append(Item(means[name, path], shape, dtype, symmetric, self._columns[name]))
        add_up(self.ranks, items)
        if not weighs:
            for item in items:
                if item.mean.pending:
                    item.mean.take(item.mean.step_sum()[0], self._weight)
        return {name for name, _ in reached}

    def _assign(self) -> None:
        blocks = self.plan.blocks
        new = {
            name: cost({path: (shape, symmetric) for path, (shape, _, symmetric) in block.sums.items()})
            for name, block in blocks.items()
            if name not in self._columns and block.sums
        }
        # A block without sums yet has some later, that of the whole model for instance; it is the only one.
        new |= {name: 1 for name in blocks if name not in self._columns and name not in new}
        self._place(new, {name: block.parts for name, block in blocks.items()})

    def _place(self, costs: Mapping[str, int], parts: Mapping[str, Collection[str]]) -> None:
        columns, together = self.ranks.columns, parts if self.whole else None
        self._columns = assigned(costs, columns, self._columns, self._costs, together)
        self._costs |= costs

    def commit(self, host: Host, blocks: Mapping[str, Kept], ema: float) -> list[str]:
        """Fold the sums of the step into the averages; in all processes or, if some are not finite, in none.

        Returns:
            Names of the blocks whose sums are not finite, as far as this process keeps them.
        """
        bad: list[str] = []

        def check() -> tuple[float]:
            kept = [block.estimator for name, block in blocks.items() if self.keeps(name)]
            if kept:
                flags = [estimator.finite() for estimator in kept]
                finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
                bad.extend(e.block.name for e, ok in zip(kept, finite, strict=True) if not ok)
            return (float(len(bad)),)

        if any(row[0] for row in self.ranks.together(check, 1)):
            for block in blocks.values():
                block.estimator.discard()
            return bad or ["blocks that other ranks keep"]
        self._prepare(host, blocks, ema)
        for name, block in blocks.items():
            if self.keeps(name):
                block.commit(ema)
            else:
                block.estimator.discard()
                block.unseen += 1
        for name in [name for name, block in blocks.items() if not self.keeps(name) and block.inverse is not None]:
            host.leave(name)
        return []

    def states(self, blocks: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
        """The state of every block, of those that others keep as well; all processes call it."""

        def own() -> dict[str, dict[str, Any]]:
            return {name: block.state_dict() for name, block in blocks.items() if self.counts(name)}

        if self.ranks.columns == 1:
            return own()
        found: dict[str, dict[str, Any]] = {}
        for part in self.ranks.objects(own):
            found |= part
        return to_device(found, self.ranks.device)

    def _prepare(self, host: Host, blocks: Mapping[str, Kept], ema: float) -> None:
        """Add up sums that follow from the first ones: the spectrum in a basis that was not known before."""
        waiting: list[str] = []

        def prepare() -> None:
            waiting.extend(name for name in sorted(self._reached) if blocks[name].estimator.prepare(ema))

        self.ranks.together(prepare)
        if not waiting:
            return
        self._publish(waiting, blocks)
        while any(row[0] for row in self.ranks.together(lambda: (float(self.plan.is_news(host)),), 1)):
            self.plan.exchange(self.ranks, host)
        self._add_up(host, weighs=False, only=waiting)

    def _publish(self, names: Iterable[str], blocks: Mapping[str, Kept]) -> None:
        """Give all processes what they need of blocks that others keep."""
        names = sorted(name for name in names if name in self._columns)
        if self.ranks.columns == 1 or not names:
            return

        def shared(name: str) -> dict[str, Tensor]:
            return blocks[name].estimator.shared() if self.keeps(name) else {}

        def described() -> dict[str, list[Published]]:
            return {
                name: [Published.of(key, x) for key, x in shared(name).items()] for name in names if self.keeps(name)
            }

        if any(name not in self._published for name in names):
            for found in self.ranks.objects(described):
                self._published |= found
        layouts = [(name, layout) for name in names for layout in self._published[name]]

        def pieces() -> list[Piece]:
            own = {name: shared(name) for name in names}
            return [Piece(self._columns[n], x.shape, x.dtype, own[n].get(x.key)) for n, x in layouts]

        received: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for (name, layout), tensor in zip(layouts, spread(self.ranks, pieces) if layouts else [], strict=True):
            received[name][layout.key] = layout.laid_out(tensor)
        for name in names:
            if not self.keeps(name) and received[name]:
                blocks[name].estimator.take_shared(received[name])

    # Inverses

    def refresh(self, due: list[Refreshing]) -> set[str]:
        """Refresh blocks; one that fails in a process keeps its last inverse in all.

        Returns:
            Names of the blocks that are new.

        Raises:
            SolverError: If a block fails without an earlier inverse, or too often in a row.
        """
        due = sorted(due, key=lambda task: task.name)
        if not due:
            return set()
        marks: dict[str, Any] = {}
        errors: dict[str, SolverError] = {}

        def attempts() -> list[float]:
            done, costs = [], []
            for task in due:
                changed = False
                if self.keeps(task.name):
                    marks[task.name] = task.kept.mark()
                    try:
                        changed = task.attempt()
                    except SolverError as error:
                        errors[task.name] = error
                done.append(2.0 if task.name in errors else float(changed))
                costs.append(float(task.kept.cost or 0))
            return done + costs

        table = self.ranks.largest(attempts, 2 * len(due))
        renewed = set()
        for task, code, work in zip(due, table, table[len(due) :], strict=False):
            if code == 2:
                if task.name in marks:
                    task.kept.back_to(marks[task.name])
                task.kept.failed(errors.get(task.name) or SolverError("the refresh failed in another process."))
            elif code == 1:
                renewed.add(task.name)
                if not self.keeps(task.name):
                    task.kept.elsewhere = int(work)
                    task.kept.failures, task.kept.unseen = 0, 0 if task.basis else task.kept.unseen
        self._publish((t.name for t in due if t.basis and t.name in renewed), {t.name: t.kept for t in due})
        return renewed

    def directions(self, blocks: Mapping[str, Kept], gradients: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """``P g`` of every block that has an inverse and all of its gradients, computed by those who keep it."""
        names = _ready(blocks, gradients)
        here = [name for name in names if self.ranks.columns == 1 or name not in self._columns]
        out = [(name, blocks[name] @ blocks[name].estimator.block.read(gradients)) for name in here]
        names = [name for name in names if name not in here]

        def compute() -> Iterator[Piece]:
            for name in names:
                block = blocks[name].estimator.block
                dtype = reduce(torch.promote_types, (gradients[part].dtype for part in block.names))
                own = blocks[name] @ block.read(gradients) if self.keeps(name) else None
                yield Piece(self._columns[name], tuple(block.shape), dtype, own)

        if names:
            out += zip(names, spread(self.ranks, lambda: list(compute())), strict=True)
        return out

    def owners(self, blocks: Mapping[str, Kept], gradients: Collection[str]) -> dict[str, int]:
        """The column that keeps a parameter's blocks, for those that have a direction other than their gradient."""
        names = _ready(blocks, gradients)
        loaded = {name: blocks[name].cost or 0 for name in names if name not in self._columns}
        if loaded:
            self._place(loaded, {name: block.estimator.block.names for name, block in blocks.items()})
        return {part: self._columns[name] for name in names for part in blocks[name].estimator.block.names}

    @property
    def first(self) -> bool:
        """Whether this process counts what none of the neighbours keeps more than others."""
        return self.ranks.column == 0

    def added(self, numbers: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Numbers of parameters, of which each of the neighbours has a part, by parameter."""
        if not numbers or self.ranks.columns == 1:
            return dict(numbers)
        total = self.row_sum(torch.stack(list(numbers.values())))
        return dict(zip(numbers, total.unbind(), strict=True))

    def row_sum(self, values: Tensor) -> Tensor:
        """Sum of what the neighbours have that keep all blocks together, each of them once."""
        if self.ranks.columns == 1:
            return values
        sizes = [values.numel()] * self.ranks.columns
        parts = self.ranks.sent(lambda: gathering_of(self.ranks.row, values.reshape(-1), sizes))
        return torch.stack(parts).sum(0).view_as(values)


def _nonzero(tensors: Sequence[Tensor | None]) -> list[float]:
    """Whether each has an entry that is not zero in this process; one wait for the device."""
    parts = [local(t) for t in tensors if t is not None]
    found = iter(torch.stack([part.any() for part in parts]).tolist() if parts else [])
    return [0.0 if t is None else float(next(found)) for t in tensors]


def _ready(blocks: Mapping[str, Kept], gradients: Collection[str]) -> list[str]:
    """Names of the blocks that have an inverse in some process, and all of their gradients."""
    return [
        name
        for name in sorted(blocks)
        if blocks[name].cost is not None and all(part in gradients for part in blocks[name].estimator.block.names)
    ]
