"""Optimizers whose curvature may span the whole model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from curvature import Block, Curvature, CurvatureEstimator
from curvature.estimation.step_collector import StepCollector, WholeCollector
from curvature.structures.estimator import Form
from curvature.structures.whole import WholeEstimator, WholeFisher, whole_block
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.method import LayerwiseMethod
from solvers.outcome.arguments import choice


class WholeModelOptimizer(LayerwiseMethod):
    """A :class:`LayerwiseMethod` that also takes a :class:`~curvature.structures.whole.WholeFisher`.

    All parameters then share one preconditioner, and so one damping. Where a parameter has no gradient in a step, its
    gradient counts as zero and it does not move. Freezing or adding parameters starts the estimate afresh.
    """

    def curvature_with(self, structure: str, fisher: str | Curvature, *, default: str) -> Curvature:
        """The curvature that ``structure=`` and ``fisher=`` mean together.

        Args:
            structure: One of those of :attr:`fisher_types`.
            fisher: A kind of Fisher, or an object; one of another structure counts where ``structure`` is the default.
            default: Default of ``structure``.

        Raises:
            ValueError: If the structure is unknown.
            TypeError: If the object is of another structure.
        """
        me = type(self).__name__
        if isinstance(structure, str) and structure == "full":
            warnings.warn(f"{me}: structure='full' is structure='dense' now.", DeprecationWarning, stacklevel=4)
            structure = "dense"
        choice("structure", structure, map(str, self.fisher_types))
        if structure == default and type(fisher) in self.fisher_types.values():
            return fisher  # type: ignore[return-value]
        return self.curvature_of(fisher, structure)

    def preconditioner(self, estimator: CurvatureEstimator) -> Preconditioner:
        """A preconditioner around an estimate."""
        return Preconditioner(estimator, self.solver, self.exponent)

    def unserved_on_shards(self) -> list[str]:
        dense = isinstance(self.curvature, WholeFisher)
        return [*super().unserved_on_shards(), *["one matrix for all parameters"] * dense]

    def collector(self) -> StepCollector:
        if not isinstance(self.curvature, WholeFisher):
            return super().collector()
        block = whole_block(self.parameters)
        if set(self.preconditioners) != {block.name} or self._whole.block != block:
            self.begin_block(block, "outer")
        self._whole.parameters = self.parameters
        return WholeCollector(self.parameters, self._whole)

    @property
    def _whole(self) -> WholeEstimator:
        (preconditioner,) = self.preconditioners.values()
        assert isinstance(preconditioner.estimator, WholeEstimator)
        return preconditioner.estimator

    def begin_block(self, block: Block, form: Form) -> CurvatureEstimator:
        if isinstance(self.curvature, WholeFisher):
            estimator: CurvatureEstimator = self.curvature.whole(self.parameters)
            self.preconditioners.clear()
        else:
            estimator = super().begin_block(block, form)
        self.preconditioners[block.name] = self.preconditioner(estimator)
        self.preconditioners[block.name].form = form
        return estimator

    def leave(self, name: str) -> None:
        super().leave(name)
        if isinstance(self.curvature, WholeFisher):
            self._reconnect()

    def follow(self) -> None:
        before = self.parameters
        super().follow()
        if isinstance(self.curvature, WholeFisher) and self.parameters is not before:
            self.statistics.collector.estimators = {}

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if not isinstance(self.curvature, WholeFisher) or not gradients:
            return super().directions(gradients)
        self.follow()
        filled: dict[Tensor, Tensor] = {}
        for p in self.parameters.values():
            filled[p] = gradients[p] if p in gradients else torch.zeros_like(p)
        out = super().directions(filled)
        return {p: d for p, d in out.items() if p in gradients}

    def after_load(self) -> None:
        super().after_load()
        if isinstance(self.curvature, WholeFisher):
            self._reconnect()

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        if "model" in saved and isinstance(self.curvature, WholeFisher):
            self._reconnect()

    def _reconnect(self) -> None:
        """Let the blocks hand their samples to the estimate that was restored."""
        self.statistics.collector = self.collector()
