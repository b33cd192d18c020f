"""Forward passes of a model, recorded while a training loop runs them."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvature.estimation.passes import Pass, release
from curvature.estimation.taped_losses import own_loss, same_numbers
from curvature.estimation.taped_model import TapedModel
from curvature.layers.recorder import Recorder
from curvature.model.data import examples_of, inspecting
from curvature.model.hooks import Hook, calling_frame, remove
from curvature.model.moment import Moment
from curvature.model.settings import autocast_dtype
from curvature.model.streams import random_state
from curvature.model.trees import tensors_in
from curvature.model.wrappers import CallGuard, data_parallel, is_compiled

LOCK = threading.RLock()  # passes are noted or let go, or a backward pass is let in


class _OfThread(threading.local):
    """The call of the model that this thread is in."""

    origin: Pass | None = None
    recorder: Recorder | None = None  # that is active in it
    frame: FrameType | None = None  # of that call
    latest: Callable[[], Tensor | None] = staticmethod(lambda: None)  # value of the last call of the loss


class Recording(TapedModel, ABC):
    """The hooks on a model: a recorder is on while its forward runs, and what was seen is kept until the step ends.

    Args:
        model: Arguments of :class:`TapedModel`.
        shadows: Nothing but inputs is recorded.
        eval_mode: Record passes in eval mode too.
        before_pass: Called before a pass is recorded.

    Attributes:
        passes: The forward passes since the last :meth:`clear` that may still count.
        records: Whether the uses of parameters are recorded.
        repeats: Whether passes will be repeated, so that inputs and random states are kept.
        cautious: The same for passes of which nobody knows yet whether they hide anything.
        here: The call of the model that this thread is in.
        handles: Of the hooks.
    """

    def __init__(self, *model: Any, shadows: bool, eval_mode: bool, before_pass: Callable[[], None] | None) -> None:
        super().__init__(*model)
        self.shadows, self.eval_mode, self.before_pass = shadows, eval_mode, before_pass
        self.records = self.repeats = self.cautious = False
        self.passes: list[Pass] = []
        self.handles: list[Any] = []
        self._given: list[weakref.ref[Tensor]] = []  # arguments of a layer, before it is made whole
        self._unmade: set[str] = set()  # parameters of which no pass had a whole one yet
        self.here = _OfThread()
        self._written: set[int] = set()  # buffers, by id, that changed in a pass or after it

    @abstractmethod
    def listen(self, origin: Pass, own: Tensor | None = None) -> None:
        """See the gradients that arrive at a pass: at its output, and at the loss that the model returned.

        Args:
            origin: The pass.
            own: That loss, where nobody saw what it consists of.
        """

    @abstractmethod
    def function_called(self, func: Any, args: Any, kwargs: Any, value: Any) -> None:
        """One of torch's loss functions was called inside the model's forward."""

    def attach(self) -> None:
        """Register the hooks (done at construction)."""
        self.close()
        target = self.called if is_compiled(self.called) else self.model
        self.handles = [
            target.register_forward_pre_hook(Hook(self, "_before_forward"), with_kwargs=True),
            target.register_forward_hook(Hook(self, "_after_forward"), with_kwargs=True, always_call=True),
            guard := CallGuard(target, Hook(self, "_after_call")),
        ]
        weakref.finalize(self, guard.remove)
        for module in [] if self.shards is None else self.shards.modules:
            for hook, first in ((Hook(self, "_before_whole"), True), (Hook(self, "_after_whole"), False)):
                self.handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def close(self) -> None:
        """Remove every hook and forget everything."""
        remove(self.handles)
        self.clear()

    def clear(self) -> None:
        """A new step begins: forget all passes."""
        self._leave()
        for origin in self.passes:
            self._written |= origin.moment.written()
            release(origin)
        self.passes = []
        if self.shards is not None:
            self.shards.release()

    @property
    def running(self) -> Pass | None:
        """The pass whose forward runs in this thread."""
        return self.here.origin

    @property
    def active(self) -> bool:
        """Whether anybody reads."""
        return self.records or self.repeats

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._wants(module) or self._runs():
            return
        self._leave()
        if self.before_pass is not None:
            self.before_pass()
        if not any(p.requires_grad for p in self.parameters().values()):
            return  # the gradient of another model passes through, as in a generator's step
        with LOCK:
            if not self.busy_elsewhere():
                self._prune()
        self.parallel = self.parallel or data_parallel(self.model)
        device = next(iter(self.parameters().values())).device
        random = random_state(device)
        origin = Pass((args, kwargs), random, moment := self._moment(), autocast_dtype(device))
        self.here.origin, self.here.frame = origin, calling_frame()
        if self.records and not self.shadows and not self.is_compiled():
            origin.recorder = self.recorder((args, kwargs), moment.tensors())
            origin.recorder.on_loss = self.function_called
            origin.recorder.__enter__()
            self.here.recorder = origin.recorder
            if self.shards is not None:
                self.shards.keep_whole()
                self._unmade = {name for name, p in self.seen().items() if p is self.parameters()[name]}

    def _moment(self) -> Moment:
        """The model as it is now, with what a repeated pass needs of its buffers.

        Where no repeat is expected, buffers that were never seen to change are not copied.
        """
        last = self.passes[-1].moment if self.passes else None
        return Moment(self.model, last, None if self.keeps_inputs else self._written)

    def _before_whole(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The parameters of a layer under ``fully_shard`` will be made whole, and its arguments handed through."""
        if self.here.recorder is not None:
            self._given = [weakref.ref(t) for t in tensors_in((args, kwargs))]

    def _after_whole(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if (recorder := self.here.recorder) is None:
            return
        made = {name: p for name, p in self.seen().items() if name in self._unmade} if self._unmade else {}
        for name, p in made.items():
            if p is not self.parameters()[name]:
                recorder.knows(p, name)
                self._unmade.remove(name)
        for p in module.parameters():
            recorder.knows(p)
        for ref, after in zip(self._given, tensors_in((args, kwargs)), strict=False):
            if (before := ref()) is not None and before is not after:
                recorder.continues(before, after)
        self._given = []

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        here, origin = self.here, self.running
        if origin is None or (here.recorder is not None and here.frame is not calling_frame()):
            return
        self._leave()
        self._written |= origin.moment.written()
        if result is None or not self._wants(module):
            return  # it raised
        own = own_loss(result, origin.calls, hidden=origin.recorder is None)
        origin.output = self.expected(result, own)
        if isinstance(origin.output, Tensor) and origin.output.dim():
            origin.examples = len(origin.output)
        for call in origin.calls:
            call.whole = same_numbers(origin.output, call.output)
        if origin.recorder is not None:
            origin.recorder.returned(result)
            self._count_by(origin)
            if origin.recorder is not None and origin.recorder.selective:
                origin.recorder, origin.again, self.cautious = None, True, True
        origin.returned = list(tensors_in(result)) if self.keeps_inputs else []
        origin.edges = tuple(get_gradient_edge(t) for t in tensors_in(result) if t.requires_grad)
        origin.end = origin.output.grad_fn if isinstance(origin.output, Tensor) else None
        with LOCK:
            self.passes.append(origin)
        self.listen(origin, own if origin.recorder is None else None)

    def _count_by(self, origin: Pass) -> None:
        """See whether the output has as many rows as another input than the one that counted the examples."""
        assert origin.recorder is not None
        number = examples_of(origin.inputs, origin.output)
        if isinstance(origin.output, Tensor) and number and number != origin.recorder.batch:
            sizes = [t.shape[0] for t in tensors_in(origin.inputs) if t.dim()]
            self.counting = sizes.index(number)
            origin.recorder, origin.again = None, True

    def _after_call(self, result: Any) -> None:
        """The call ended, whichever way; backward hooks of the module give its result another place in the graph.

        What they make of a gradient is no matter of curvature: it is read before them.
        """
        self._leave()
        origin = self.passes[-1] if self.passes and not inspecting() else None
        if result is None or origin is None or not isinstance(origin.output, Tensor):
            return
        if not (self.model._backward_hooks or self.model._backward_pre_hooks):
            return
        with contextlib.suppress(TypeError):
            z = self.seen_by_the_loss(result)
            if z is not origin.output and z.requires_grad and same_numbers(origin.output, z):
                origin.edges += (get_gradient_edge(z),)
                origin.output = z
                self.listen(origin)

    def _leave(self) -> None:
        """Leave the recorder: the forward pass ended, whichever way."""
        here, recorder = self.here, self.here.recorder
        here.recorder = here.origin = here.frame = None
        if recorder is not None:
            recorder.on_loss = None
            recorder.__exit__(None, None, None)
            if self.shards is not None:
                self.shards.forward_ended()

    def _runs(self) -> bool:
        """Whether the call that is being recorded has not returned: the model calls itself."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.here.frame:
            frame = frame.f_back
        return self.running is not None and frame is not None

    @abstractmethod
    def busy_elsewhere(self) -> bool:
        """Whether a backward pass through the model runs in another thread."""

    @property
    def keeps_inputs(self) -> bool:
        """Whether passes are kept until the step, so that they can be repeated."""
        return self.repeats or self.cautious or self.shadows or self.is_compiled()

    def _wants(self, module: nn.Module) -> bool:
        if not self.active or inspecting() or self.inside or not torch.is_grad_enabled():
            return False
        return module.training or self.eval_mode

    def _prune(self) -> None:
        """Let go of passes that nothing will arrive at any more."""
        kept = []
        for origin in self.passes:
            waits = any(call.alive() is not None for call in origin.calls) or not origin.calls
            arrived = origin.arriving is not None or any(call.arriving is not None for call in origin.calls)
            counts = arrived or bool(origin.counted) or origin.gradient is not None or origin.own_weight is not None
            if waits and not counts:
                kept.append(origin)
            else:
                release(origin)
                if counts and (self.keeps_inputs or origin.again):
                    kept.append(origin)
        self.passes = kept
