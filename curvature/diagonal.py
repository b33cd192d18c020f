"""Diagonal curvature: one number per parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from curvature.average import WeightedMean
from curvature.block import Block
from curvature.estimator import Curvature, CurvatureEstimator, Form
from curvature.losses import widen
from curvature.samples import Samples
from solvers import Diagonal, LinearOperator


class DiagonalEstimator(CurvatureEstimator):
    r"""Exact diagonal of the block: :math:`\frac{1}{total} \sum_{k, n} (\sum_s g_{kns} a_{ns}^\top)^2`, entry by entry.

    Where an example has one position, no per-sample gradient is formed: the sum is ``(g^2)^T a^2``.
    """

    structure: ClassVar[str] = "diagonal"

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.mean = WeightedMean()

    def update(self, samples: Samples) -> None:
        self.mean.add(widen(samples.square_sum()), samples.weight if samples.first else 0.0)

    def commit(self, ema: float) -> None:
        self.mean.commit(ema)

    def discard(self) -> None:
        self.mean.discard()

    def finite(self) -> Tensor:
        return self.mean.finite()

    @property
    def ready(self) -> bool:
        return self.mean.value is not None

    def operator(self) -> LinearOperator:
        if self.mean.value is None:
            raise RuntimeError(f"block {self.block.name}: no statistics yet; run a forward and backward pass first.")
        return Diagonal(self.mean.value)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.load_state_dict(state["mean"])


@dataclass(frozen=True)
class DiagonalFisher(Curvature):
    """Diagonal of the Fisher or GGN; exact for ``kind="exact"``."""

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return DiagonalEstimator(block)
