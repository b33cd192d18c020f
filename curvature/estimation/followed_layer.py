"""One layer that is followed through every pass, where nothing is recorded too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from curvature.model.backward_hooks import ours
from curvature.model.data import inspecting
from curvature.model.hooks import At, EagerHook, remove


class FollowedLayer(ABC):
    """Hears of a layer's passes: its input, the gradient at its output, and what autograd writes.

    The hooks are registered by :meth:`~curvature.estimation.tape.Tape.follow`. They cost less than a recorder, which
    sees every operation of a pass.

    Args:
        layer: A module that is called on one tensor and returns one.
        parameters: Those whose gradients are written.
    """

    def __init__(self, layer: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self.layer, self._parameters = layer, list(parameters)
        self._handles: list[Any] = []

    @abstractmethod
    def ran(self, x: Tensor, output: Tensor) -> bool:
        """The layer ran in a pass that is not the library's own; whether the gradient at its output is waited for."""

    @abstractmethod
    def arrived(self, gradient: Tensor) -> None:
        """That gradient is there."""

    @abstractmethod
    def written(self, parameter: Tensor) -> None:
        """Autograd wrote the gradient of a parameter."""

    def attach(self) -> None:
        """Register the hooks."""
        self._handles = [self.layer.register_forward_hook(EagerHook(self, "_after_forward"))]
        hook = EagerHook(self, "written")
        self._handles += [p.register_post_accumulate_grad_hook(hook) for p in self._parameters]

    def close(self) -> None:
        """Remove the hooks."""
        remove(self._handles)

    def _after_forward(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not args or not output.requires_grad or inspecting() or not self.ran(args[0], output):
            return
        base = output if output._base is None else output._base
        if base.grad_fn is not None and base.numel() == output.numel():
            ours(base.grad_fn.register_prehook(At(self, "_at_output", base.output_nr)))

    def _at_output(self, number: int, gradients: tuple[Tensor | None, ...]) -> None:
        if (gradient := gradients[number]) is not None:
            self.arrived(gradient.detach())
