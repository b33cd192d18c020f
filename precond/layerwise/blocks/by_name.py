"""The blocks of a model, each with its preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from curvature.layers.block import BlockPart
from curvature.structures.weighted_mean import finite_each
from precond.distributed.curvature import SharedCurvature
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.blocks.refresh import slots
from precond.layerwise.blocks.rows import GradientRows
from precond.layerwise.blocks.stacks import BlockStack
from precond.layerwise.blocks.together import BlockRefresh, renew, shared_out
from solvers import Eigen, Kronecker, LinearOperator, SolverError
from solvers.outcome.checks import Verdicts


class Preconditioners(dict[str, Preconditioner]):
    """Name of a block -> its preconditioner; with the operations of a step on all of them."""

    def discard(self) -> None:
        """Forget the statistics of the step."""
        for preconditioner in self.values():
            preconditioner.estimator.discard()

    def commit(self, ema: float) -> list[str]:
        """Fold the statistics of the step into the averages; all of them or, if some are not finite, none.

        Args:
            ema: Weight of the old averages.

        Returns:
            Names of the blocks whose statistics are not finite.
        """
        estimators = [p.estimator for p in self.values()]
        witnesses = [(e.block.name, number) for e in estimators for number in e.witnesses()]
        flags = (
            finite_each([number for _, number in witnesses]).tolist() if witnesses else []
        )  # one wait for the device
        bad = list(dict.fromkeys(name for (name, _), ok in zip(witnesses, flags, strict=True) if not ok))
        if bad:
            self.discard()
            return bad
        for preconditioner in self.values():
            preconditioner.commit(ema)
        return []

    def slots(self, period: int) -> dict[str, int]:
        """The step within a period at which each inverse is due, so that all steps cost about the same."""
        return slots({name: cost for name, p in self.items() if (cost := p.cost) is not None}, period)

    def refresh(
        self,
        due: Mapping[str, Mapping[str, Any]],
        then: Callable[[Sequence[str], LinearOperator | None], None] = lambda names, metric: None,
    ) -> set[str]:
        """Refresh blocks, with one wait for the device where their solver allows; one that fails keeps its inverse.

        Small ones of a shape are renewed as one, see :mod:`~precond.layerwise.blocks.together`; where that fails, each
        by itself.

        Args:
            due: Block's name -> arguments of :meth:`Preconditioner.refresh`.
            then: Called with the names of blocks that have a new P, and the :meth:`Preconditioner.metric` of the one,
                or those of several in a stack, where the damped C is kept; before their checks are read. Nothing holds
                the metric after that. Called again for blocks whose stack has failed.

        Returns:
            Names of the blocks that have a new P.

        Raises:
            SolverError: If a refresh fails without an earlier inverse, or too many fail in a row.
        """
        renewed, failures = self._renewed(shared_out(self, due), then)
        apart = [
            BlockRefresh([name], due[name], [])
            for refresh, _ in failures
            if len(refresh.names) > 1
            for name in refresh.names
        ]
        if apart:
            again, more = self._renewed(apart, then)
            renewed |= again
            failures += more
        for refresh, failure in failures:
            if len(refresh.names) == 1:
                self[refresh.names[0]].failed(failure)
        return renewed

    def _renewed(
        self, refreshes: Iterable[BlockRefresh], then: Callable[[Sequence[str], LinearOperator | None], None]
    ) -> tuple[set[str], list[tuple[BlockRefresh, Exception]]]:
        """Names of the blocks that have a new P, and the refreshes that failed, whose blocks are as before."""
        verdicts, renewed = Verdicts(), set[str]()
        tried = list[tuple[BlockRefresh, list[Any]]]()
        errors = dict[str, Exception]()
        for number, refresh in enumerate(refreshes):
            names, key = refresh.names, str(number)
            tried.append((refresh, [self[name].mark(estimate=False) for name in names]))
            first = self[names[0]]
            try:
                with verdicts.of(key) if first.fails_late else nullcontext():
                    if len(names) == 1:
                        new, metric = first.refresh(**refresh.options)
                    else:
                        new, metric = True, renew([self[name] for name in names], refresh.operators, **refresh.options)
            except SolverError as error:
                errors[key] = error
                continue
            if new:
                renewed.update(names)
                then(names, metric)
            del metric
        failed = []
        for key, failure in (errors | verdicts.failures()).items():
            refresh, marks = tried[int(key)]
            renewed.difference_update(refresh.names)
            for name, mark in zip(refresh.names, marks, strict=True):
                self[name].back_to(mark)
            failed.append((refresh, failure))
        return renewed, failed

    def apply(
        self,
        gradients: Mapping[str, Tensor],
        rows: Mapping[str, GradientRows],
        stacks: Iterable[BlockStack],
        shared: SharedCurvature | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``P g`` for every block that has an inverse and all of its gradients, and the plain ``g`` elsewhere.

        Args:
            gradients: Parameter's name -> gradient.
            rows: Block's name -> the rows behind its gradient, where they are at hand.
            stacks: Blocks that are computed together.
            shared: Computes with other processes.

        Returns:
            Parameter's name -> ``P g``; and what of its gradient went through as it is, zero elsewhere, where there is
            such a part.
        """
        out: dict[str, Tensor] = {}
        done: set[str] = set()
        for stack in stacks:
            if shared is None and not rows.keys() & stack.parts.keys():
                found = stack.apply(gradients)
                if found is not None:
                    out |= found
                    done |= stack.parts.keys()
        written: dict[str, list[BlockPart]] = {}
        for key, direction in self._directions(gradients, rows, done, shared):
            block = self[key].estimator.block
            for part, piece in zip(block.parts, direction, strict=True):
                g = gradients[part.name]
                if part.covers(g):  # in one piece, since what follows reads the directions several times
                    piece = (piece if piece.dtype == g.dtype else piece.to(g.dtype)).contiguous()
                    out[part.name] = piece if piece.shape == g.shape else piece.view(g.shape)
                    continue
                if part.name not in out:
                    out[part.name] = torch.empty_like(g, memory_format=torch.contiguous_format)
                part.write(piece, out[part.name].view(-1))
                written.setdefault(part.name, []).append(part)
        plain = {}
        for name, g in gradients.items():
            if name not in out or (name in written and sum(part.numel for part in written[name]) < g.numel()):
                out[name], plain[name] = _filled(out.get(name), g, written.get(name, []))
        return {name: out[name] for name in gradients}, plain

    def _directions(
        self,
        gradients: Mapping[str, Tensor],
        rows: Mapping[str, GradientRows],
        done: Set[str],
        shared: SharedCurvature | None,
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """``P g`` of the blocks that are not done, part by part."""
        if shared is not None:
            for key, direction in shared.directions(self, gradients):
                yield key, self[key].estimator.block.split(direction)
            return
        for key, preconditioner in self.items():
            block, inverse = preconditioner.estimator.block, preconditioner.inverse
            if key in done or inverse is None or not all(name in gradients for name in block.names):
                continue
            if key in rows and isinstance(inverse, (Kronecker, Eigen)):
                yield key, rows[key].apply(inverse)
            else:
                yield key, block.split(preconditioner @ block.read(gradients))


def _filled(result: Tensor | None, gradient: Tensor, written: list[BlockPart]) -> tuple[Tensor, Tensor]:
    """A result with the gradient outside these parts, and the gradient with zeros in them."""
    rest = gradient.clone(memory_format=torch.contiguous_format)
    whole = rest.clone()
    for part in written:
        assert result is not None
        part.write(torch.zeros_like(part.read(rest.view(-1))), rest.view(-1))
        part.write(part.read(result.view(-1)), whole.view(-1))
    return whole, rest
