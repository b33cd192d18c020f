"""The batch of the current step once more: outputs with their graph, Hessians of the loss in them, and its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from curvature.losses import loss_for
from curvature.model.data import Output, inspecting, inspection, resolve_output
from curvature.model.hooks import Hook
from curvature.model.settings import random_state, set_random_state, settings
from curvature.model.wrappers import is_compiled, plain_checkpoints, unwrapped
from precond.step.graph import (
    BackwardDoesNothing,
    CurvedOutput,
    GaussNewtonMatrix,
    curved_output,
    curved_outputs,
    gram,
    loss_calls,
    loss_tensor,
    unflatten,
)


class Replay(ABC):
    """Evaluates the loss of the current step again, at whatever values the parameters have.

    Random numbers are those of the step (dropout repeats itself); buffers, gradients and the random stream stay as they
    are, and nothing is recorded as a training pass.
    """

    @abstractmethod
    def parts(self, stride: int = 1) -> tuple[list[CurvedOutput], Tensor]:
        """Outputs with Hessians, whose Gauss-Newton matrix is that of the loss; and the value of the loss.

        Args:
            stride: The matrix may be that of every ``stride``-th example, in the same units; the value is of all.

        Raises:
            ValueError: If examples cannot be picked.
        """

    @abstractmethod
    def value(self) -> Tensor:
        """The loss, without graph."""

    def gram(self, params: list[Tensor], vectors: list[Tensor], stride: int = 1) -> tuple[Tensor, Tensor]:
        """``V^T C V`` for flat vectors as columns of V, in float64, and the value of the loss; see :meth:`parts`."""
        parts, value = self.parts(stride)
        return GaussNewtonMatrix(parts, params).gram(vectors), value


@dataclass
class _Call:
    """A call of the loss on the output of a pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size  # of the output as the loss saw it
    value: Tensor  # what it returned
    weight: Tensor | None = None  # derivative of what backward() was called on

    def given(self, z: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with an output in the place of the one that was seen."""
        return self._filled(z.reshape(self.shape), lambda value: value)

    def picked(self, z: Tensor, stride: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of every ``stride``-th example, with the output of these."""
        return self._filled(z, lambda value: _every(value, self.shape[0], stride))

    def _filled(self, z: Tensor, other: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fill = lambda value: z if value is _OUTPUT else other(value)  # noqa: E731
        return tuple(map(fill, self.args)), {key: fill(value) for key, value in self.kwargs.items()}


_OUTPUT = object()


@dataclass
class _Pass:
    """A forward pass of the model."""

    inputs: tuple[Any, Any]
    random: list[Tensor]
    output: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)

    def picked(self, stride: int) -> tuple[Any, Any]:
        """The inputs of every ``stride``-th example."""
        number = len(self.output) if self.output is not None and self.output.dim() else -1
        args, kwargs = self.inputs
        return (
            tuple(_every(value, number, stride) for value in args),
            {key: _every(value, number, stride) for key, value in kwargs.items()},
        )


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
        self.forward_mode = True  # until an operation of the model turns out to have no forward derivative
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
            value.detach(),
        )
        (self._elsewhere if origin is None else origin.calls).append(call)

        def note(gradient: Tensor) -> None:
            if not inspecting():
                call.weight = gradient.detach().sum()

        value.register_hook(note)

    def _evaluate(self, stride: int = 1, values: Mapping[str, Tensor] | None = None) -> Iterator[tuple[_Call, Tensor]]:
        """Every call of the loss that counted, and the output it sees.

        Args:
            stride: Of every so many examples only.
            values: In the places of parameters.
        """
        seen = [p for p in self._passes if any(call.weight is not None for call in p.calls)]
        if not seen or any(call.weight is not None for call in self._elsewhere):
            raise RuntimeError(
                "the batch of this step cannot be run again, because the loss module given to the optimizer was not "
                "called on the model's output as it is or as a view of it. Call loss_fn(model(x), y), name the output "
                "with output=, or call step(closure)."
            )
        for origin in seen:
            args, kwargs = origin.inputs if stride == 1 else origin.picked(stride)
            with settings(self.model, origin.random, self.device), inspection(), plain_checkpoints():
                if values is None:
                    result = self.model.forward(*args, **kwargs)
                else:
                    result = functional_call(_Bare(self.model), dict(values), args, kwargs)
                z = resolve_output(result, self.output)
                for call in origin.calls:
                    if call.weight is not None:
                        yield call, z

    @torch.enable_grad()
    def parts(self, stride: int = 1) -> tuple[list[CurvedOutput], Tensor]:
        return [self._part(call, z, stride) for call, z in self._evaluate(stride)], self._seen()

    def gram(self, params: list[Tensor], vectors: list[Tensor], stride: int = 1) -> tuple[Tensor, Tensor]:
        if self.forward_mode:
            try:
                return self._forward_gram(params, vectors, stride), self._seen()
            except (NotImplementedError, RuntimeError):
                self.forward_mode = False
        return super().gram(params, vectors, stride)

    @torch.no_grad()
    def _forward_gram(self, params: list[Tensor], vectors: list[Tensor], stride: int) -> Tensor:
        """By forward derivatives: a pass for each vector, and no graph."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        parts: list[CurvedOutput] = []
        images: list[list[Tensor]] = []
        for vector in vectors:
            with forward_ad.dual_level():
                values = {
                    f"model.{names[p]}": forward_ad.make_dual(p.detach(), v.to(p.dtype))
                    for p, v in unflatten(vector, params).items()
                }
                pushed = [(call, forward_ad.unpack_dual(z)) for call, z in self._evaluate(stride, values)]
            images.append([torch.zeros_like(z.primal) if z.tangent is None else z.tangent for _, z in pushed])
            parts = parts or [self._part(call, z.primal, stride) for call, z in pushed]
        return gram(
            parts, [[x.reshape_as(part.value) for part, x in zip(parts, image, strict=True)] for image in images]
        )

    def _part(self, call: _Call, z: Tensor, stride: int) -> CurvedOutput:
        assert call.weight is not None
        weight = float(call.weight)
        if stride == 1:
            return curved_output(self.loss_fn, *call.given(z), weight)
        _refuse_unpicked(call, z, stride)
        if getattr(self.loss_fn, "reduction", "mean") == "sum":
            weight *= call.shape[0] / len(z)
        return curved_output(self.loss_fn, *call.picked(z, stride), weight)

    def _seen(self) -> Tensor:
        """The loss as the loop computed it."""
        seen = [(call.weight, call.value) for p in self._passes for call in p.calls]
        terms = [weight.double() * value.double() for weight, value in seen if weight is not None]
        return torch.stack(terms).sum().cpu()

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
        return loss_tensor(self.closure(), "the optimizer")

    def parts(self, stride: int = 1) -> tuple[list[CurvedOutput], Tensor]:
        if stride != 1:
            raise ValueError(
                "QuadraticModel(fraction=...) picks examples of the batch, and a closure's batch cannot be seen. Run "
                "the plain loop, or pass fraction=1."
            )
        with loss_calls(self.loss_fn) as calls, self._undisturbed():
            loss = self._loss()
            out = curved_outputs(self.loss_fn, calls, loss)
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


class _Bare(nn.Module):
    """Runs a model without the hooks on the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def _every(value: Any, number: int, stride: int) -> Any:
    """Every ``stride``-th entry of what has one entry per example."""
    return value[::stride] if isinstance(value, Tensor) and value.dim() and len(value) == number else value


def _refuse_unpicked(call: _Call, z: Tensor, stride: int) -> None:
    expected = (-(-call.shape[0] // stride), *call.shape[1:]) if call.shape else ()
    if z.shape != expected:
        raise ValueError(
            f"QuadraticModel(fraction=...) takes every {stride}-th example of the inputs, and the loss then should see "
            f"an output of shape {tuple(expected)}; it is {tuple(z.shape)}. Let inputs, outputs and targets have the "
            "examples along their first axis, or pass fraction=1."
        )


def _same(output: Tensor | None, z: Any) -> bool:
    """Whether the loss sees the output, or a view of all of it in its order."""
    if output is None or not isinstance(z, Tensor):
        return False
    if z is output:
        return True
    whole = z.numel() == output.numel() and z.is_contiguous() and output.is_contiguous()
    return whole and z.data_ptr() == output.data_ptr()
