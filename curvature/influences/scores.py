"""One pass over the training examples: their scores for the queries, kept in a file as they grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.estimation.accumulation import Accumulation
from curvature.estimation.checkpoint import Checkpoint
from curvature.estimation.probe import Sketches, sketches
from curvature.influences.products import by_example, by_position
from curvature.influences.rows import QueryRows
from curvature.layers.block import BlockPlace
from curvature.matrices.examples import Examples, Keeper
from curvature.matrices.problem import Evaluation, Problem
from curvature.model.settings import untouched
from solvers import Place


class Found:
    """The scores found so far in a pass over the training examples.

    Args:
        problem: The training loss.

    Attributes:
        counts: Examples of each batch.
        empty: Numbers of the batches in which no term counts.
        losses: Loss of each batch, which tells whether another pass saw the same.
        total: Divisor of the loss.
        mean: Whether that is a sum over batches.
        random: Random state at the start of the pass, on which the order of a shuffling loader depends.
        blocks: ``{block: [(Q, n) of each batch]}``.
        positions: ``{block: [(Q, n, s) of each batch]}``.
    """

    def __init__(self, problem: Problem) -> None:
        self.parameters = problem.parameters
        self.counts: list[int] = []
        self.empty: list[int] = []
        self.losses: list[float] = []
        self.total, self.mean = 0.0, False
        self.random = problem.random
        self.blocks: dict[str, list[Tensor]] = {}
        self.positions: dict[str, list[Tensor]] = {}

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and numbers."""
        return {name: value for name, value in vars(self).items() if name != "parameters"}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore :meth:`state`; the tensors move to the parameters' device."""
        vars(self).update(saved)
        for parts in (self.blocks, self.positions):
            for name, tensors in parts.items():
                parts[name] = [tensor.to(self.parameters.device) for tensor in tensors]

    def begin(self, evaluation: Evaluation, examples: int) -> None:
        """Begin a batch: record its loss."""
        assert evaluation.terms is not None
        with torch.no_grad():
            self.losses.append(float(evaluation.terms.value()))
        if evaluation.empty:
            self.empty.append(len(self.counts))
        self.counts.append(examples)
        self.total, self.mean = self.total + float(evaluation.total) if evaluation.mean else 1.0, evaluation.mean

    def add(self, block: str, values: Tensor) -> None:
        """Scores ``(Q, n)`` of the batch in a block."""
        known = self.blocks.setdefault(block, [])
        self._fill(known, len(self.counts) - 1, values)
        known.append(values)

    def add_positions(self, block: str, values: Tensor) -> None:
        """Scores ``(Q, n, s)`` of the batch in a block."""
        self.positions.setdefault(block, []).append(values)

    def by_block(self) -> dict[str, Tensor]:
        """``{block: (Q, N)}``."""
        for known in self.blocks.values():
            self._fill(known, len(self.counts), known[0])
        return {name: torch.cat(found, dim=1) for name, found in self.blocks.items()}

    def by_position(self) -> dict[str, Tensor]:
        """``{block: (Q, N, S)}`` of the blocks that had positions in every batch."""
        number = len(self.counts) - len(self.empty)
        whole = {name: list(found) for name, found in self.positions.items() if len(found) == number}
        for found in whole.values():
            for index in self.empty:
                found.insert(index, found[0].new_zeros(len(found[0]), self.counts[index], 0))
        return {name: _padded(found) for name, found in whole.items()}

    def _fill(self, known: list[Tensor], batches: int, like: Tensor) -> None:
        """Zeros for batches that did not use the block."""
        known += [like.new_zeros(len(like), n) for n in self.counts[len(known) : batches]]


def walk(
    problem: Problem,
    found: Found,
    use: Callable[[Evaluation], Any],
    title: str,
    file: Checkpoint | None,
    asked: Problem | None = None,
) -> None:
    """Visit every remaining batch of the problem.

    Args:
        problem: The training loss.
        found: Where ``use`` puts what it finds.
        use: Called with each evaluation.
        title: Text of the progress bar.
        file: Where all this is kept.
        asked: The queries, where there are some.
    """

    def also() -> dict[str, Sketches]:
        return {} if asked is None else {"queries": seen_in(asked)}

    run = Accumulation(problem.model, found, torch.Generator(), 1, file, problem.terms, also)
    start = problem.start
    problem.start = lambda: run.batches(start)
    with untouched(problem.model):
        run.resume()
        if run.number == 0:
            problem.visit(use, title, recorded=True, every=True)
            run.end_pass()
        problem.start = start
        run.finish(start)


def scores(
    problem: Problem,
    asked: Problem,
    rows: QueryRows,
    positions: bool,
    joint: bool,
    file: Checkpoint | None,
    title: str,
) -> Found:
    """Inner products of the rows with the gradient of every training example.

    Args:
        problem: The training loss.
        asked: The loss of the queries.
        rows: Preconditioned gradients of the queries.
        positions: Split them by position, too.
        joint: Whether weight and bias of a layer form one block.
        file: Where the scores are kept as they grow.
        title: Text of the progress bar.
    """
    found = Found(problem)
    sizes = {name: p.numel() for name, p in problem.parameters.items()}
    keeper = Keeper(problem.parameters, joint)

    def visit(evaluation: Evaluation) -> None:
        examples = Examples.of(evaluation)
        found.begin(evaluation, examples.number)
        for block, parts in keeper.samples(examples, [examples.terms.gradient()]):
            place: Place = BlockPlace.of(block, problem.parameters.starts, sizes)
            at = rows.at(place)
            split = _joined([by_position(samples, at) for samples in parts]) if positions else None
            if split is not None:
                found.add_positions(block.name, split)
                found.add(block.name, split.sum(-1))
            else:
                found.add(block.name, torch.cat([by_example(samples, at) for samples in parts], dim=1))

    walk(problem, found, visit, title, file, asked)
    return found


def seen_in(problem: Problem) -> Sketches:
    """What is computed on the first batch."""
    found: list[Sketches] = []

    def look(evaluation: Evaluation) -> None:
        if not found:
            assert evaluation.terms is not None
            found.append(sketches(evaluation.terms, problem.parameters))

    problem.visit(look, "queries")
    return found[0]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Parts joined along the examples; ``None`` if one is missing."""
    found = [part for part in parts if part is not None]
    return torch.cat(found, dim=1) if len(found) == len(parts) else None


def _padded(parts: list[Tensor]) -> Tensor:
    """Examples of different lengths ``(Q, n, s)`` in one tensor."""
    length = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[-1])) for part in parts], dim=1)
