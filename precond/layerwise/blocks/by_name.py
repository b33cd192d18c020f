"""The blocks of a model, each with its preconditioner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from curvature.layers.block import BlockPart
from curvature.structures.weighted_mean import finite_each
from precond.distributed.curvature import SharedCurvature
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.blocks.refresh import refresh_cost, slots
from precond.layerwise.blocks.rows import GradientRows
from solvers import Kronecker


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
        costs = {name: p.elsewhere if p.inverse is None else refresh_cost(p.inverse) for name, p in self.items()}
        return slots({name: cost for name, cost in costs.items() if cost is not None}, period)

    def apply(
        self,
        gradients: Mapping[str, Tensor],
        rows: Mapping[str, GradientRows],
        results: Mapping[str, Tensor],
        shared: SharedCurvature | None = None,
    ) -> dict[str, Tensor]:
        """Write ``P g`` for every block that has an inverse and all of its gradients, and the plain ``g`` elsewhere.

        Args:
            gradients: Parameter's name -> gradient.
            rows: Block's name -> the rows behind its gradient, where they are at hand.
            results: Parameter's name -> contiguous tensor to write to.
            shared: Computes with other processes.

        Returns:
            Parameter's name -> what of its gradient went through as it is, zero elsewhere; where there is such a part.
        """
        written: dict[str, list[BlockPart]] = {name: [] for name in gradients}
        found = self._directions(gradients, rows) if shared is None else shared.directions(self, gradients)
        for key, direction in found:
            block = self[key].estimator.block
            block.write(direction, results)
            for part in block.parts:
                written[part.name].append(part)
        plain = [name for name, parts in written.items() if sum(p.numel for p in parts) < gradients[name].numel()]
        return {name: _fill(results[name], gradients[name], written[name]) for name in plain}

    def _directions(
        self, gradients: Mapping[str, Tensor], rows: Mapping[str, GradientRows]
    ) -> Iterator[tuple[str, Tensor]]:
        for key, preconditioner in self.items():
            block, inverse = preconditioner.estimator.block, preconditioner.inverse
            if inverse is None or not all(name in gradients for name in block.names):
                continue
            if key in rows and isinstance(inverse, Kronecker):
                yield key, rows[key].apply(inverse)
            else:
                yield key, preconditioner @ block.read(gradients)


def _fill(result: Tensor, gradient: Tensor, written: list[BlockPart]) -> Tensor:
    """Write a gradient outside these parts; returns it with zeros in them."""
    rest = gradient.clone(memory_format=torch.contiguous_format)
    for part in written:
        part.write(torch.zeros_like(part.read(rest.view(-1))), rest.view(-1))
    whole = rest.clone()
    for part in written:
        part.write(part.read(result.view(-1)), whole.view(-1))
    result.copy_(whole)
    return rest
