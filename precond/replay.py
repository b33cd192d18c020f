"""The batch of the current step once more: outputs with their graph, Hessians of the loss in them, and its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvature.data import Output, inspecting, inspection, resolve_output
from curvature.hooks import Hook
from curvature.losses import loss_for
from curvature.settings import random_state, set_random_state, settings
from curvature.wrappers import is_compiled, plain_checkpoints, unwrapped
from precond.closure import BackwardDoesNothing
from precond.products import Part, loss_part


class Replay(ABC):
    """Evaluates the loss of the current step again, at whatever values the parameters have.

    Random numbers are those of the step (dropout repeats itself); buffers, gradients and the random stream stay as they
    are, and nothing is recorded as a training pass.
    """

    @abstractmethod
    def parts(self) -> tuple[list[Part], Tensor]:
        """Outputs with Hessians, whose Gauss-Newton matrix is that of the loss; and the value of the loss."""

    @abstractmethod
    def value(self) -> Tensor:
        """The loss, without graph."""


@dataclass
class _Call:
    """A call of the loss on the output of a pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size  # of the output as the loss saw it
    weight: Tensor | None = None  # derivative of what backward() was called on

    def given(self, z: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with an output in the place of the one that was seen."""
        z = z.reshape(self.shape)
        fill = lambda value: z if value is _OUTPUT else value  # noqa: E731
        return tuple(map(fill, self.args)), {key: fill(value) for key, value in self.kwargs.items()}


_OUTPUT = object()


@dataclass
class _Pass:
    """A forward pass of the model."""

    inputs: tuple[Any, Any]
    random: list[Tensor]
    output: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)


class LoopReplay(Replay):
    """Watches a plain loop: inputs of the model, arguments of the loss, and what the loss was multiplied by.

    The loss module must be called on the model's output, or on a reshaped view of it.

    Args:
        model: The model that the loop calls; compiled ones are run eagerly again.
        loss_fn: The loss module that the loop calls.
        output: Picks the output tensor where the model returns something else.
    """

    def __init__(self, model: nn.Module, loss_fn: nn.Module, output: Output | None = None) -> None:
        self.model, self.loss_fn, self.output = unwrapped(model), loss_fn, output
        self.device = next(self.model.parameters()).device
        self.compiled = False
        self._passes: list[_Pass] = []
        self._elsewhere: list[_Call] = []  # calls of the loss on something else
        target = model if is_compiled(model) else self.model
        self._handles = [
            target.register_forward_pre_hook(Hook(self, "_before_forward"), with_kwargs=True),
            target.register_forward_hook(Hook(self, "_after_forward"), with_kwargs=True),
            loss_fn.register_forward_hook(Hook(self, "_after_loss"), with_kwargs=True),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self._passes, self._elsewhere = [], []

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not inspecting():
            self._passes.append(_Pass((args, kwargs), random_state(self.device)))

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if torch.is_grad_enabled() and not inspecting() and self._passes:
            try:
                self._passes[-1].output = resolve_output(result, self.output)
            except TypeError:
                if self.output is not None:
                    raise

    def _after_loss(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.requires_grad or inspecting():
            return
        z = args[0] if args else kwargs.get("input")
        origin = next((p for p in self._passes if _same(p.output, z)), None)
        call = _Call(
            tuple(_OUTPUT if a is z else a for a in args),
            {key: _OUTPUT if a is z else a for key, a in kwargs.items()},
            z.shape if isinstance(z, Tensor) else torch.Size(),
        )
        (self._elsewhere if origin is None else origin.calls).append(call)

        def note(gradient: Tensor) -> None:
            if not inspecting():
                call.weight = gradient.detach().sum()

        value.register_hook(note)

    def _evaluate(self) -> Iterator[tuple[_Call, Tensor]]:
        """Every call of the loss that counted, and the output it sees."""
        seen = [p for p in self._passes if any(call.weight is not None for call in p.calls)]
        if not seen or any(call.weight is not None for call in self._elsewhere):
            raise RuntimeError(
                "the batch of this step cannot be run again, because the loss module given to the optimizer was not "
                "called on the model's output as it is or as a view of it. Call loss_fn(model(x), y), name the output "
                "with output=, or call step(closure)."
            )
        for origin in seen:
            args, kwargs = origin.inputs
            with settings(self.model, origin.random, self.device), inspection(), plain_checkpoints():
                z = resolve_output(self.model.forward(*args, **kwargs), self.output)
                for call in origin.calls:
                    if call.weight is not None:
                        yield call, z

    @torch.enable_grad()
    def parts(self) -> tuple[list[Part], Tensor]:
        out, total = [], torch.zeros((), dtype=torch.float64)
        for call, z in self._evaluate():
            args, kwargs = call.given(z)
            assert call.weight is not None
            out.append(loss_part(self.loss_fn, args, kwargs, float(call.weight)))
            total += float(call.weight) * self.loss_fn.forward(*args, **kwargs).detach()
        return out, total

    @torch.no_grad()
    def value(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for call, z in self._evaluate():
            args, kwargs = call.given(z)
            assert call.weight is not None
            total += float(call.weight) * self.loss_fn.forward(*args, **kwargs)
        return total


class ClosureReplay(Replay):
    """Calls the closure again; ``backward()`` inside does nothing, and ``zero_grad()`` is undone.

    Args:
        closure: Computes the loss of the batch and returns it, with its graph.
        model: The model.
        loss_fn: The loss module that the closure calls.
        random: Random states at the start of the step.
    """

    def __init__(self, closure: Callable[[], Any], model: nn.Module, loss_fn: nn.Module, random: list[Tensor]) -> None:
        self.closure, self.model, self.loss_fn, self.random = closure, unwrapped(model), loss_fn, random

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        gradients = {p: p.grad for p in self.model.parameters()}
        device = next(iter(gradients)).device
        try:
            with settings(self.model, self.random, device), inspection(), torch.enable_grad(), BackwardDoesNothing():
                set_random_state(self.random, device)
                yield
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient

    def _loss(self) -> Tensor:
        loss = self.closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(
                "the closure must return the loss as a tensor with one number and its graph, so that it can be "
                "evaluated again; return the loss itself, not loss.item() or loss.detach()."
            )
        return loss.reshape(())

    def parts(self) -> tuple[list[Part], Tensor]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        handle = self.loss_fn.register_forward_hook(
            lambda module, args, kwargs, value: calls.append((args, kwargs, value)), with_kwargs=True
        )
        try:
            with self._undisturbed():
                loss = self._loss()
                weights = torch.autograd.grad(loss, [v for _, _, v in calls], retain_graph=True, allow_unused=True)
        finally:
            handle.remove()
        out = [
            loss_part(self.loss_fn, args, kwargs, float(weight.sum()))
            for (args, kwargs, _), weight in zip(calls, weights, strict=True)
            if weight is not None
        ]
        if not out:
            raise RuntimeError("the closure did not call the loss module given to the optimizer.")
        return out, loss.detach().double()

    def value(self) -> Tensor:
        with self._undisturbed():
            return self._loss().detach().double()


def interpretable(loss_fn: Any, what: str) -> nn.Module:
    """A loss module whose Hessian in the output is known.

    Raises:
        TypeError: If it is no module.
        UnknownLossError: If it is of unknown type.
    """
    if not isinstance(loss_fn, nn.Module):
        raise TypeError(f"{what} needs the loss module that the loop calls, not {type(loss_fn).__name__}.")
    loss_for(loss_fn)
    return loss_fn


@contextmanager
def parameters_at(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the block the parameters have other values; afterwards their own, bit for bit."""
    own = {p: p.data for p in values}
    try:
        for p, value in values.items():  # not in place: graphs hold the parameters as they were
            p.data = value
        yield
    finally:
        for p, data in own.items():
            p.data = data


def _same(output: Tensor | None, z: Any) -> bool:
    """Whether the loss sees the output, or a view of all of it in its order."""
    if output is None or not isinstance(z, Tensor):
        return False
    if z is output:
        return True
    whole = z.numel() == output.numel() and z.is_contiguous() and output.is_contiguous()
    return whole and z.data_ptr() == output.data_ptr()
