"""What is kept of a forward pass until its statistics are taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.estimation.collector import Backward
from curvature.layers.recorder import Recorder
from curvature.losses import Terms
from curvature.model.data import inspecting

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Pass:
    """What it takes to repeat one forward pass and its loss."""

    inputs: Call
    losses: list[Call] = field(default_factory=list)  # calls of the loss on the output itself; None stands for it
    output: Tensor | None = None  # and the gradient that arrived there
    output_gradient: Tensor | None = None


@dataclass(eq=False)
class Recording:
    """One recorded forward pass of the model."""

    recorder: Recorder
    origin: Pass
    output: Any  # what the loss is expected to see
    edges: tuple[GradientEdge, ...] = ()  # of all tensors the model returned
    used: bool = False
    total: Tensor | None = None  # divisor of the first loss that saw it
    counted: set[Any] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)  # of hooks on tensors, which would keep their graph alive

    def release(self) -> None:
        """Let go of the graph: cycles through autograd are invisible to Python's garbage collector."""
        for handle in self.handles:
            handle.remove()


@dataclass
class Waiting:
    """Statistics that the user's backward pass will bring."""

    backward: Backward
    recordings: list[Recording]
    terms: Terms
    scale: Tensor | None = None

    def shares(self, recordings: list[Recording]) -> bool:
        """Whether one of these passes is waited for."""
        return any(recording in self.recordings for recording in recordings)

    def note_scale(self, gradient: Tensor) -> None:
        """What the loss was multiplied by (GradScaler, accumulation): the gradient that arrives at it."""
        if not inspecting():
            self.scale = gradient.detach()

    @property
    def factor(self) -> Tensor:
        """Turns the gradients of the pass into those of the sum of all terms."""
        assert self.scale is not None
        return (self.terms.total if self.terms.reduction == "mean" else 1.0) / self.scale


def merged(recorders: list[Recorder]) -> Recorder:
    """Several forward passes that led to one loss, as one."""
    first = recorders[0]
    if len(recorders) == 1:
        return first
    out = Recorder({}, (), first.batch)
    for recorder in recorders:
        out.sites += recorder.sites
        out.examples_interact |= recorder.examples_interact
        for name, operations in recorder.unknown.items():
            out.unknown.setdefault(name, set()).update(operations)
    return out
