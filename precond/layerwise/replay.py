"""The batch of the current step once more: outputs with their graph, Hessians of the loss in them, and its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from curvature.estimation.passes import Pass, TapedLoss
from curvature.estimation.tape import Tape
from curvature.losses import SumOfLosses
from curvature.model.fully_sharded import named_parameters
from curvature.model.moment import Moment
from curvature.model.settings import settings
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
from solvers.outcome.memory import is_out_of_memory


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


class LoopReplay(Replay):
    """The batch of a plain loop, from the tape.

    The loss module must be called on the model's output, or on a reshaped view of it.

    Args:
        tape: Has the passes of the step.
        loss_fn: The loss module that the loop calls.
    """

    def __init__(self, tape: Tape, loss_fn: nn.Module) -> None:
        self.tape, self.model, self.loss_fn = tape, tape.model, loss_fn
        self.forward_mode = True  # until an operation of the model turns out to have no forward derivative
        self._passes: list[Pass] = []
        self._elsewhere: list[TapedLoss] = []  # calls of the loss on something else

    def take(self) -> None:
        """Take the batch of the step that is under way."""
        self._passes, self._elsewhere = self.tape.passes, self.tape.outside

    def clear(self) -> None:
        """Forget the batch."""
        self._passes, self._elsewhere = [], []

    def _evaluate(
        self, stride: int = 1, values: Mapping[str, Tensor] | None = None
    ) -> Generator[tuple[TapedLoss, Tensor], None, None]:
        """Every call of the loss that counted, and the output it sees; to be closed, since settings hold meanwhile.

        Args:
            stride: Of every so many examples only.
            values: In the places of parameters.
        """
        calls = [call for origin in self._passes for call in origin.counted]
        other = any(c.edited or not c.whole for c in calls) or any(c.weight is not None for c in self._elsewhere)
        if not calls or other:
            raise RuntimeError(
                "the batch of this step cannot be run again, because the loss module given to the optimizer was not "
                "called on the model's output as it is, unchanged, or as a view of it. Call loss_fn(model(x), y), name "
                "the output with loop=Loop(output=...), or call step(closure)."
            )
        for origin in self._passes:
            if origin.counted:
                inputs = origin.inputs if stride == 1 else _picked(origin, stride)
                with self.tape.repeat(origin, record=False, inputs=inputs, values=values, twice=True) as again:
                    for call in origin.counted:
                        yield call, again.output

    @torch.enable_grad()
    def parts(self, stride: int = 1) -> tuple[list[CurvedOutput], Tensor]:
        with closing(self._evaluate(stride)) as runs:
            return [self._part(call, z, stride) for call, z in runs], self._seen()

    def gram(self, params: list[Tensor], vectors: list[Tensor], stride: int = 1) -> tuple[Tensor, Tensor]:
        if self.forward_mode and not isinstance(self.loss_fn, SumOfLosses):
            try:
                return self._forward_gram(params, vectors, stride), self._seen()
            except (NotImplementedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
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
                    names[p]: forward_ad.make_dual(p.detach(), v.to(p.dtype))
                    for p, v in unflatten(vector, params).items()
                }
                with closing(self._evaluate(stride, values)) as runs:
                    pushed = [(call, forward_ad.unpack_dual(z)) for call, z in runs]
            images.append([torch.zeros_like(z.primal) if z.tangent is None else z.tangent for _, z in pushed])
            parts = parts or [self._part(call, z.primal, stride) for call, z in pushed]
        return gram(
            parts, [[x.reshape_as(part.value) for part, x in zip(parts, image, strict=True)] for image in images]
        )

    def _part(self, call: TapedLoss, z: Tensor, stride: int) -> CurvedOutput:
        assert call.weight is not None
        weight = float(call.weight.sum())
        if stride == 1:
            return curved_output(self.loss_fn, *call.arguments(call.seen(z)), weight)
        if isinstance(self.loss_fn, SumOfLosses):
            raise ValueError(
                "QuadraticModel(fraction=...) takes a part of the examples of one output and its targets, and the loss "
                "is a sum of losses. Pass fraction=1."
            )
        _refuse_unpicked(call, z, stride)
        if getattr(self.loss_fn, "reduction", "mean") == "sum":
            weight *= call.shape[0] / len(z)
        return curved_output(self.loss_fn, *_picked_arguments(call, z, stride), weight)

    def _seen(self) -> Tensor:
        """The loss as the loop computed it."""
        seen = [(call.weight, call.value) for origin in self._passes for call in origin.counted]
        terms = [(weight.double() * value.double()).sum() for weight, value in seen if weight is not None]
        return torch.stack(terms).sum().cpu()

    @torch.no_grad()
    def value(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        with closing(self._evaluate()) as runs:
            for call, z in runs:
                args, kwargs = call.arguments(call.seen(z))
                assert call.weight is not None
                total += (call.weight * self.loss_fn.forward(*args, **kwargs)).sum().double().cpu()
        return total


class ClosureReplay(Replay):
    """Calls the closure again; ``backward()`` inside does nothing, and ``zero_grad()`` is undone.

    Args:
        closure: Computes the loss of the batch and returns it, with its graph.
        model: The model.
        loss_fn: The loss module that the closure calls.
        random: Random states at the start of the step.
        moment: The model at the start of the step.
    """

    def __init__(
        self, closure: Callable[[], Any], model: nn.Module, loss_fn: nn.Module, random: list[Tensor], moment: Moment
    ) -> None:
        self.closure, self.model, self.loss_fn, self.random = closure, model, loss_fn, random
        self.moment = moment

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        gradients = {p: p.grad for _, p in named_parameters(self.model)}
        device = next(iter(gradients)).device
        try:
            with settings(self.model, self.random, device, self.moment), torch.enable_grad(), BackwardDoesNothing():
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


def _every(value: Any, number: int, stride: int) -> Any:
    """Every ``stride``-th entry of what has one entry per example."""
    return value[::stride] if isinstance(value, Tensor) and value.dim() and len(value) == number else value


def _refuse_unpicked(call: TapedLoss, z: Tensor, stride: int) -> None:
    expected = (-(-call.shape[0] // stride), *call.shape[1:]) if call.shape else ()
    if z.shape != expected:
        raise ValueError(
            f"QuadraticModel(fraction=...) takes every {stride}-th example of the inputs, and the loss then should see "
            f"an output of shape {tuple(expected)}; it is {tuple(z.shape)}. Let inputs, outputs and targets have the "
            "examples along their first axis, or pass fraction=1."
        )


def _picked_arguments(call: TapedLoss, z: Tensor, stride: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for every ``stride``-th example, with the output of these."""
    return call.arguments(z, lambda value: _every(value, call.shape[0], stride))


def _picked(origin: Pass, stride: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of every ``stride``-th example."""
    args, kwargs = origin.inputs
    number = origin.examples
    return (
        tuple(_every(value, number, stride) for value in args),
        {key: _every(value, number, stride) for key, value in kwargs.items()},
    )
