"""The contracts of curvature: what to estimate, and the estimate of one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.losses.signals import FisherKind, check_kind
from curvature.structures.weighted_mean import WeightedMean
from solvers import LinearOperator
from solvers.precision import widen

Form = Literal["outer", "per_sample"]


class CurvatureEstimator(ABC):
    """The estimate of one block of C.

    A step calls :meth:`update` once per backward pass of each batch, then :meth:`commit` (or :meth:`discard`, if the
    step is skipped). :meth:`operator` is the current estimate.
    """

    #: Name of the structure in tables: what :meth:`operator` returns.
    structure: ClassVar[str]

    @property
    def averages_positions(self) -> bool:
        """Whether the positions of an example are averaged, so that it must be known which belong to one example."""
        return False

    def __init__(self, block: Block) -> None:
        self.block = block

    @abstractmethod
    def update(self, samples: Samples) -> None:
        """Add the samples of one backward pass to the current step."""

    def count(self, weight: Tensor | float) -> None:
        """Count examples of the current step that did not reach the block: their gradients are zero."""
        raise NotImplementedError(
            f"block {self.block.name}: only some batches of this step or data set used it, which {type(self).__name__} "
            "does not serve. Take another structure, leave the block out with params=, or put the data in one batch."
        )

    @abstractmethod
    def commit(self, ema: float) -> None:
        r"""Fold the step into the running average, in which old values keep the weight ``ema`` (:math:`\beta`)."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the current step."""

    @abstractmethod
    def finite(self) -> Tensor:
        """0-d bool tensor: the current step has neither NaN nor inf."""

    @property
    def stored(self) -> int:
        """Numbers the estimate keeps."""
        return self.block.numel

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether anything was ever committed."""

    @abstractmethod
    def operator(self) -> LinearOperator:
        """The current C, acting on tensors of the block's shape, in float32 or wider."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    def refresh_basis(self) -> None:  # noqa: B027  (most estimates have no basis)
        """Redo costly decompositions inside the estimate."""

    def begin_passes(self) -> None:  # noqa: B027  (most estimates need a single pass and nothing to prepare)
        """Announce that a data set follows which can be seen again; training steps cannot."""

    def next_pass(self) -> bool:
        """After a pass over a data set: prepare another one over the same data; False when one was enough."""
        return False


class MeanEstimator(CurvatureEstimator):
    """An estimate that is a function of one mean over the examples."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.mean = WeightedMean()

    @abstractmethod
    def total(self, samples: Samples) -> Tensor:
        """What the samples add to the mean's numerator."""

    @abstractmethod
    def of_mean(self, value: Tensor) -> LinearOperator:
        """The estimate for a value of the mean."""

    def update(self, samples: Samples) -> None:
        self.mean.add(samples.scaled(widen(self.total(samples))), samples.weight if samples.first else 0.0)

    def count(self, weight: Tensor | float) -> None:
        self.mean.add(None, weight)

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
        return self.of_mean(self.mean.value)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.load_state_dict(state["mean"])


@dataclass(frozen=True)
class Curvature(ABC):
    """What is to be estimated: the matrix and its structure. One object serves all blocks.

    Attributes:
        kind: ``"exact"``, ``"mc"`` (sampled from the model) or ``"empirical"`` (from the targets).
        samples: Draws per batch for ``"mc"``.
    """

    kind: FisherKind = "mc"
    samples: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        check_kind(self.kind)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}.")

    #: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    needs: ClassVar[str] = "layers"
    #: Whether weight and bias of a layer form one block.
    joint: ClassVar[bool] = True
    #: Passes over a data set.
    passes: ClassVar[int] = 1

    def on(self, model: nn.Module) -> Curvature:
        """This curvature for a model; one with rules for modules looks them up."""
        return self

    @abstractmethod
    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        """A fresh estimate for one block.

        Args:
            block: The block.
            form: ``"outer"`` for layers ``y = W a``; ``"per_sample"`` for all others.
        """
