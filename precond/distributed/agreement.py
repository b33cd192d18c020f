"""Decisions that all processes take together: which blocks there are, and who holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature.estimation.statistics import Statistics
from curvature.layers.block import Block
from curvature.structures.estimator import CurvatureEstimator, Form
from precond.distributed.ranks import Ranks

#: Sum -> shape, dtype, and whether it is a stack of symmetric matrices.
Sums = dict[str, tuple[tuple[int, ...], torch.dtype, bool]]


@dataclass
class SharedBlock:
    """What all processes know of a block.

    Attributes:
        parts: Its :meth:`~curvature.layers.block.Block.state`.
        form: How samples reach it.
        operations: What it is used by, in the process that saw it first.
        generic: Whether its gradients are taken by autograd.
        sums: The sums of its estimate.
    """

    parts: dict[str, Any]
    form: Form
    operations: tuple[str, ...]
    generic: bool
    sums: Sums = field(default_factory=dict)


class Estimated(Protocol):
    """A block of an optimizer."""

    @property
    def estimator(self) -> CurvatureEstimator:
        """Its estimate."""
        ...

    @property
    def form(self) -> Form:
        """How samples reach it."""
        ...


class Host(Protocol):
    """The part of an optimizer that shares its curvature."""

    @property
    def statistics(self) -> Statistics:
        """What the passes of the step have brought."""
        ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The tracked parameters."""
        ...

    @property
    def preconditioners(self) -> Mapping[str, Estimated]:
        """The blocks."""
        ...

    def begin_block(self, block: Block, form: Form) -> CurvatureEstimator:
        """Make a block that another process has seen."""
        ...

    def leave(self, name: str) -> None:
        """Leave a block to the processes that keep it."""
        ...


class SharedPlan:
    """The blocks and the sums of all processes: whatever one has seen, all have.

    Attributes:
        blocks: Name -> what all know of it.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, SharedBlock] = {}
        self._without_rule: dict[str, str] = {}

    def is_news(self, host: Host) -> bool:
        """Whether this process has something that the others may not know of."""
        return self._own(host) != (self.blocks, self._without_rule)

    def _own(self, host: Host) -> tuple[dict[str, SharedBlock], dict[str, str]]:
        collector = host.statistics.collector
        reasons = {name: self._without_rule.get(name, why) for name, why in collector.plan.without_rule.items()}
        blocks = {}
        for name, kept in host.preconditioners.items():
            known = self.blocks.get(name)
            means = kept.estimator.step_means()
            sums: Sums = dict(known.sums) if known is not None else {}
            for path, mean in means.items():
                total, _ = mean.step_sum()
                sums[path] = (tuple(total.shape), total.dtype, total.dim() == mean.matrix_axes)
            operations = collector.operations.get(name, ()) if known is None else known.operations
            block = kept.estimator.block
            generic = not reasons.keys().isdisjoint(block.names)
            blocks[name] = SharedBlock(block.state(), kept.form, operations, generic, sums)
        return blocks, reasons

    def exchange(self, ranks: Ranks, host: Host) -> None:
        """Let all processes know the blocks of all.

        Raises:
            RuntimeError: If the processes use the same parameters in ways that have no common blocks.
        """
        found = ranks.objects(lambda: self._own(host))
        ranks.together(lambda: self._adopt(found, host))

    def _adopt(self, found: list[tuple[dict[str, SharedBlock], dict[str, str]]], host: Host) -> None:
        statistics = host.statistics
        collector = statistics.collector
        reasons = {name: why for _, given in reversed(found) for name, why in given.items()}
        doubted = {n: w for n, w in reasons.items() if n not in collector.plan.without_rule and n in host.parameters}
        if doubted:  # another process has seen a use of these that no rule covers
            collector.plan.distrust(doubted)
            collector.give_up({name for name in collector.plan.lost() if name in collector.estimators})
            if statistics.batches:
                statistics.repeat()
        self._without_rule, self.blocks = reasons, {}
        for rank, (blocks, _) in enumerate(found):
            for name, block in blocks.items():
                if not block.generic and not reasons.keys().isdisjoint(block.parts):
                    continue
                known = self.blocks.setdefault(name, block)
                if (known.parts, known.form) != (block.parts, block.form) or any(
                    known.sums.setdefault(path, what) != what for path, what in block.sums.items()
                ):
                    raise RuntimeError(
                        f"block {name} has another shape on rank {rank} of the group than on a lower one: the ranks "
                        "use this layer in different ways. Pass bias='separate', or leave it out with params=."
                    )
        self._create(host)
        self.blocks = {name: self.blocks[name] for name in sorted(self.blocks)}

    def _create(self, host: Host) -> None:
        """Make the blocks that only others have seen."""
        collector = host.statistics.collector
        made = {name: Block.from_state(name, block.parts) for name, block in self.blocks.items()}
        for name, block in made.items():
            other = next((n for n, b in made.items() if n < name and b.overlaps(block)), None)
            if other is not None:
                raise RuntimeError(
                    f"the ranks of the group put the same parameters into different blocks, {other} and {name}. Pass "
                    "bias='separate', or leave them out with params=."
                )
            if name not in host.preconditioners:
                shared = self.blocks[name]
                collector.plan.adopt(block)
                collector.estimators[name] = host.begin_block(block, shared.form)
                collector.operations[name], collector.forms[name] = shared.operations, shared.form
