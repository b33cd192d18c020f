"""Collectors for estimates that need the samples of all blocks side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvature.estimation.collector import Collector
from curvature.layers.block import Block
from curvature.losses.signals import Signals
from curvature.model.parameters import Parameters
from curvature.structures.estimator import CurvatureEstimator, Form
from curvature.structures.whole import Share, WholeEstimator


class ApartCollector(Collector):
    """For training with estimates that need gradients of true sign, of one example at a time, in all blocks."""

    def __init__(
        self, parameters: Parameters, make: Callable[[Block, Form], CurvatureEstimator], joint: bool = True
    ) -> None:
        super().__init__(parameters, make, joint=joint, apart="signs")

    def signed(self, signals: Signals) -> Any:
        # Random signs would do for squares alone.
        return signals.one_by_one()


class WholeCollector(ApartCollector):
    """Hands the samples of all blocks to one estimate."""

    def __init__(self, parameters: Parameters, whole: WholeEstimator) -> None:
        super().__init__(parameters, lambda block, form: Share(block, self.whole))
        self.whole = whole

    def collect(self, *args: Any, **kwargs: Any) -> set[str]:
        self.whole.next_batch()
        return super().collect(*args, **kwargs)

    def collect_backward(self, *args: Any, **kwargs: Any) -> set[str]:
        self.whole.next_batch()
        return super().collect_backward(*args, **kwargs)
