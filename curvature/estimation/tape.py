"""The record of a training step: forward passes, calls of the loss, and the gradients that arrive at them.

There is one set of hooks on a model. Recording a pass, seeing the loss, and the arrival of the user's gradient are
events of one record; whoever needs inputs, uses of parameters, or the batch once more reads it here.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvature.estimation.followed_layer import FollowedLayer
from curvature.estimation.passes import Inputs, Pass, Reader, TapedLoss, release
from curvature.estimation.selection import selection
from curvature.estimation.taped_losses import called_again, same_numbers, taped
from curvature.estimation.unseen_losses import UnseenLosses, explained
from curvature.layers.recorder import Recorder
from curvature.losses.loss import called, module_called
from curvature.losses.sum_of_losses import SumOfLosses
from curvature.model.backward_hooks import muted, no_backward_hooks, of_leaves, ours
from curvature.model.data import Output, batch_size, examples_of, inspecting, loss_in, resolve_output
from curvature.model.fully_sharded import FullyShard, Mark, call_forward, shard_of
from curvature.model.graph_nodes import nodes
from curvature.model.hooks import At, Hook, OwnHook, calling_frame
from curvature.model.moment import Moment
from curvature.model.parameters import with_values
from curvature.model.settings import autocast_dtype, autocasting, settings, untouched
from curvature.model.streams import random_state
from curvature.model.trees import tensors_in
from curvature.model.wrappers import (
    CallGuard,
    data_parallel,
    is_compiled,
    plain_checkpoints,
    undisturbed,
    unwrapped,
)

Mode = Literal["auto", "loss", "gradient", "shadow"]
MODES: tuple[Mode, ...] = ("auto", "loss", "gradient", "shadow")

#: Model -> depth of backward passes of the library's own. Hooks may run in threads of the device.
_OWN_PASSES: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class Tape:
    """Records what a training loop does with a model and its loss, without changing anything that it computes.

    A pass counts when, and only when, its gradient arrived: in a backward pass that ended, which wrote to ``p.grad``,
    where the gradient still stands when the optimizer steps. Everything before that is taken back whole.

    Args:
        model: The module the user calls; wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss module the user calls, or one that describes what is computed elsewhere.
        parameters: The tracked parameters at this moment, by name.
        output: Picks the output tensor where the model returns something else.
        mode: How the loss is found: ``"auto"``, or only by its call (``"loss"``), by the gradient at the model's output
            (``"gradient"``), or from passes that are repeated after the step's backward passes (``"shadow"``).
        eval_mode: Record passes in eval mode too.
        before_pass: Called before a pass is recorded.

    Attributes:
        passes: The forward passes since the last :meth:`clear` that may still count.
        reader: Computes statistics while gradients arrive.
        records: Whether the uses of parameters are recorded.
        parallel: The DistributedDataParallel through which the model is called, once that was seen.
        shards: The parameters under ``fully_shard``, if there are any.
        nonzero: Of these, those with a gradient that is not zero in some process, where that is known.
        repeats: Whether passes will be repeated, so that inputs and random states are kept.
        cautious: The same for passes of which nobody knows yet whether they hide anything.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        parameters: Callable[[], Mapping[str, Tensor]],
        *,
        output: Output | None = None,
        mode: Mode = "auto",
        eval_mode: bool = False,
        before_pass: Callable[[], None] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"capture must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
        self.called, self.model, self.parameters = model, unwrapped(model), parameters
        self.loss_module = module_called(loss_fn)
        self.output, self.mode, self.eval_mode, self.before_pass = output, mode, eval_mode, before_pass
        self.reader: Reader | None = None
        self.parallel = data_parallel(model)
        self.shards = FullyShard.of(self.model)
        self.nonzero: frozenset[str] | None = None
        self._given: list[weakref.ref[Tensor]] = []  # arguments of a layer, before it is made whole
        self._unmade: set[str] = set()  # parameters of which no pass had a whole one yet
        self.records = self.repeats = self.cautious = False
        self.compiled = False  # a call of the model ran compiled code
        self.shadows = mode == "shadow"  # nothing but inputs is recorded
        self.passes: list[Pass] = []
        self.outside: list[TapedLoss] = []  # calls of the loss that no pass led to
        self._pass: Pass | None = None  # whose forward runs
        self._open: Recorder | None = None  # that is active in it
        self._frame: FrameType | None = None  # of that call of the model
        self._thread = threading.get_ident()  # that calls the model; a loss module may be shared with other threads
        self._written: set[int] = set()  # buffers, by id, that changed in a pass or after it
        self._counting = 0  # which of the input tensors counts the examples
        self._latest: Callable[[], Tensor | None] = lambda: None  # value of the last call of the loss
        self._task: int | None = None  # the user's backward pass under way
        self._unseen = UnseenLosses(self.loss_module)
        self._before: dict[str, Mark] = {}  # gradients when it began
        self._marks: dict[str, Mark] = {}  # gradients when the last one ended
        self._handles: list[Any] = []
        self._followed: weakref.WeakSet[FollowedLayer] = weakref.WeakSet()
        self.attach()

    # Life

    def attach(self) -> None:
        """Register the hooks (done at construction)."""
        self.close()
        target = self.called if is_compiled(self.called) else self.model
        self._handles = [
            target.register_forward_pre_hook(Hook(self, "_before_forward"), with_kwargs=True),
            target.register_forward_hook(Hook(self, "_after_forward"), with_kwargs=True, always_call=True),
            guard := CallGuard(target, Hook(self, "_after_call")),
        ]
        weakref.finalize(self, guard.remove)
        if self.loss_module is not None:
            self._handles.append(self.loss_module.register_forward_hook(Hook(self, "_after_loss"), with_kwargs=True))
        for module in [] if self.shards is None else self.shards.modules:
            for hook, first in ((Hook(self, "_before_whole"), True), (Hook(self, "_after_whole"), False)):
                self._handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def follow(self, layer: FollowedLayer) -> None:
        """Tell of every pass through one layer of the model, in steps in which nothing is recorded too."""
        layer.attach()
        self._followed.add(layer)

    def close(self) -> None:
        """Remove every hook and forget everything."""
        for layer in self._followed:
            layer.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """A new step begins: forget all passes."""
        self._leave()
        for origin in self.passes:
            self._written |= origin.moment.written()
            release(origin)
        self.passes, self.outside = [], []
        self._task, self._marks, self.nonzero = None, {}, None
        if self.shards is not None:
            self.shards.release()

    @property
    def active(self) -> bool:
        """Whether anybody reads."""
        return self.records or self.repeats

    @property
    def inside(self) -> bool:
        """Whether a backward pass of the library's own runs through the model."""
        return _OWN_PASSES.get(self.model, 0) > 0

    # Forward passes

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._wants(module) or self._runs():
            return
        self._leave()
        if self.before_pass is not None:
            self.before_pass()
        self._prune()
        self.parallel = self.parallel or data_parallel(self.model)
        device = next(iter(self.parameters().values())).device
        random = random_state(device)
        self._thread = threading.get_ident()
        self._pass = Pass((args, kwargs), random, moment := self._moment(), autocast_dtype(device))
        self._frame = calling_frame()
        if self.records and not self.shadows and not self.is_compiled():
            self._pass.recorder = self.recorder((args, kwargs), moment.tensors())
            self._pass.recorder.on_loss = self._after_function
            self._pass.recorder.__enter__()
            self._open = self._pass.recorder
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
        if self._open is not None:
            self._given = [weakref.ref(t) for t in tensors_in((args, kwargs))]

    def _after_whole(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._open is None:
            return
        made = {name: p for name, p in self.seen().items() if name in self._unmade} if self._unmade else {}
        for name, p in made.items():
            if p is not self.parameters()[name]:
                self._open.knows(p, name)
                self._unmade.remove(name)
        for p in module.parameters():
            self._open.knows(p)
        for ref, after in zip(self._given, tensors_in((args, kwargs)), strict=False):
            if (before := ref()) is not None and before is not after:
                self._open.continues(before, after)
        self._given = []

    def seen(self) -> Mapping[str, Tensor]:
        """The tracked parameters by the tensors that passes use in their place."""
        parameters = self.parameters()
        if self.shards is None:
            return parameters
        return {name: self.shards.whole(p) for name, p in parameters.items()}

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if self._pass is None or (self._open is not None and self._frame is not calling_frame()):
            return
        origin = self._pass
        self._leave()
        self._written |= origin.moment.written()
        if result is None or not self._wants(module):
            return  # it raised
        origin.output = self._expected(result)
        if isinstance(origin.output, Tensor) and origin.output.dim():
            origin.examples = len(origin.output)
        for call in origin.calls:
            call.whole = same_numbers(origin.output, call.output)
        if origin.recorder is None and (own := loss_in(result)) is not None and own.requires_grad:
            origin.own = taped(self.model, (), {}, None, own.detach(), [], True)
            hook = At(self, "_gradient_at_own_loss", origin)
            ours(own.register_hook(hook))
            origin.own.alive = weakref.ref(hook)
        if origin.recorder is not None:
            origin.recorder.returned(result)
            self._count_by(origin)
        origin.returned = list(tensors_in(result)) if self.keeps_inputs else []
        origin.edges = tuple(get_gradient_edge(t) for t in tensors_in(result) if t.requires_grad)
        origin.end = origin.output.grad_fn if isinstance(origin.output, Tensor) else None
        self.passes.append(origin)
        self._listen(origin)

    def _listen(self, origin: Pass) -> None:
        """See the gradient that arrives at the output."""
        if isinstance(origin.output, Tensor) and origin.output.requires_grad and self.mode != "loss":
            if origin.at_output is not None:
                origin.at_output.remove()
            origin.at_output = _first(origin.output, At(self, "_gradient_at_output", origin))

    def _count_by(self, origin: Pass) -> None:
        """See whether the output has as many rows as another input than the one that counted the examples."""
        assert origin.recorder is not None
        number = examples_of(origin.inputs, origin.output)
        if isinstance(origin.output, Tensor) and number and number != origin.recorder.batch:
            sizes = [t.shape[0] for t in tensors_in(origin.inputs) if t.dim()]
            self._counting = sizes.index(number)
            origin.recorder, origin.again = None, True

    def _expected(self, result: Any) -> Any:
        """What the loss is expected to see; ``None`` where the result does not tell.

        Of several tensors that is the only one that is no loss by itself and can be differentiated.
        """
        try:
            return self.seen_by_the_loss(result)
        except TypeError:
            if self.output is not None:
                raise
            own = loss_in(result)
            outputs = [t for t in tensors_in(result) if t.requires_grad and t is not own]
            return outputs[0] if len(outputs) == 1 else None

    def seen_by_the_loss(self, result: Any) -> Any:
        """What the loss is called on: a tensor, or several where it is a sum of losses."""
        if self.output is None and isinstance(self.loss_module, SumOfLosses):
            return result
        return resolve_output(result, self.output)

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
                self._listen(origin)

    def _leave(self) -> None:
        """Leave the recorder: the forward pass ended, whichever way."""
        recorder, self._open, self._pass, self._frame = self._open, None, None, None
        if recorder is not None:
            recorder.on_loss = None
            recorder.__exit__(None, None, None)
            if self.shards is not None:
                self.shards.forward_ended()

    def _runs(self) -> bool:
        """Whether the call that is being recorded has not returned: the model calls itself."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return self._pass is not None and frame is not None

    def is_compiled(self) -> bool:
        """Whether calls of the model run compiled code, in which no use of a parameter is seen."""
        return self.compiled or is_compiled(self.called)

    @property
    def keeps_inputs(self) -> bool:
        """Whether passes are kept until the step, so that they can be repeated."""
        return self.repeats or self.cautious or self.shadows or self.is_compiled()

    # Calls of the loss

    def _after_loss(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        """The loss module was called, by the loop or inside the model's own forward."""
        if self._pass is not None and self._thread == threading.get_ident() and self._latest() is value:
            return  # it called one of torch's functions, which was seen already
        self._called(module, args, kwargs, value)

    def _after_function(self, func: Any, args: Any, kwargs: Any, value: Any) -> None:
        """One of torch's loss functions was called inside the model's forward."""
        found = called(func, args, kwargs)
        if found is not None and isinstance(value, Tensor):
            self._called(found[0], found[1], {}, value)

    def _called(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if not self.active or self.mode == "gradient" or inspecting() or self.inside:
            return
        if self._thread != threading.get_ident():
            return
        if not isinstance(value, Tensor) or not value.requires_grad:
            return
        z = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if not any(t.requires_grad for t in tensors_in(z)):
            return
        passes = [self._pass] if self._pass is not None else self._leading_to(z)
        if passes is None:
            return
        call = taped(module, args, kwargs, z, value.detach(), passes, self._pass is not None)
        if len(passes) == 1 and isinstance(z, Tensor) and self.keeps_inputs and not call.whole:
            with self.own_pass(passes, z):
                call.selection = selection(passes[0].returned, z)
        call.looked, call.number = self.keeps_inputs, _number(value)
        hook = At(self, "_gradient_at_loss", call)
        ours(value.register_hook(hook))
        call.alive, self._latest = weakref.ref(hook), weakref.ref(value)
        if not passes:
            self.outside.append(call)
        if self.reader is not None and self.records:
            self.reader.called(call)

    def _leading_to(self, z: Any) -> list[Pass] | None:
        """The recorded passes that something was computed from; ``None`` if it has nothing to do with the model.

        A loss module may serve several models. Where a model returned no tensor that autograd knows, its parameters
        tell.
        """
        waiting = [origin for origin in self.passes if not origin.released]
        direct = [origin for origin in waiting if origin.output is z]
        if direct:
            return direct + self.feeding(direct)
        ends = {edge.node: origin for origin in waiting for edge in origin.edges}
        tracked = {id(p) for p in self.seen().values()}
        reached = list(nodes(tensors_in(z), until=ends))
        found = {id(ends[node]) for node in reached if node in ends}
        uses = any(id(getattr(node, "variable", None)) in tracked for node in reached)
        if not found and not uses:
            return None
        passes = [origin for origin in waiting if id(origin) in found or (uses and not origin.edges)]
        return passes + self.feeding(passes)

    def feeding(self, passes: list[Pass]) -> list[Pass]:
        """Further passes, whose outputs are inputs of these."""
        inputs = [t for origin in passes for t in tensors_in(origin.inputs) if t.grad_fn is not None]
        before = (self._leading_to(inputs) or []) if inputs else []
        return [origin for origin in before if origin not in passes]

    # Gradients

    def _gradient_at_loss(self, call: TapedLoss, gradient: Tensor) -> None:
        if self.inside or not self.active:
            return
        self._enter()
        gradient = gradient.detach()
        call.arriving = gradient if call.arriving is None else call.arriving + gradient
        if self.reader is not None and self.records:
            self.reader.arrived(call, gradient)

    def _gradient_at_own_loss(self, origin: Pass, gradient: Tensor) -> None:
        """Of a model in which nobody saw the losses that it consists of: it is run again."""
        if self.inside or not self.active or self.mode == "loss":
            return
        self._enter()
        assert origin.own is not None
        origin.own.arriving = gradient.detach() + (0 if origin.own.arriving is None else origin.own.arriving)
        origin.again = True

    def _gradient_at_output(self, origin: Pass, gradient: Tensor) -> None:
        if self.inside or not self.active:
            return
        self._enter()
        seen = [call for call in origin.calls if call.arriving is not None]
        unseen = self._unseen.above(origin, bool(seen))
        if unseen is None:
            return
        origin.beside |= len(unseen) > 1 or bool(unseen and seen)
        origin.unseen_loss = unseen[0] if len(unseen) == 1 and origin.gradient is None else None
        origin.task, origin.edited = torch._C._current_graph_task_id(), origin.output.grad_fn is not origin.end
        if any(not call.moved for call in unseen):
            return self._not_told()
        if seen and unseen:
            with self.own_pass([origin], origin.output):
                part = explained(origin.output, seen)
            if part is None:
                return self._not_told()
            origin.size, gradient, seen = gradient.abs().amax(), gradient - part, []
        if any(call.whole for call in seen):
            return
        if self.keeps_inputs or origin.again or origin.opaque:
            gradient = gradient.detach()
            origin.seen = origin.output.detach()
            origin.arriving = gradient if origin.arriving is None else origin.arriving + gradient
        if seen and origin.recorder is not None:
            return  # the calls of the loss have told already
        if self.reader is not None and self.records:
            self.reader.arrived_at_output(origin, gradient.detach())

    def _not_told(self) -> None:
        if self.reader is not None and self.records:
            self.reader.not_told()

    def _enter(self) -> None:
        """A gradient of the user's backward pass arrived: the first one begins a transaction."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self.settle()
        self._task, self._before = task, self._gradients()
        if self.mode != "loss":
            self._unseen.look(self.passes, self._calls())
        ended = "_ended" if self.shards is None else "_nearly_ended"
        torch.autograd.Variable._execution_engine.queue_callback(At(self, ended, task))
        if self.reader is not None:
            self.reader.begin()

    def _nearly_ended(self, task: int) -> None:
        """``fully_shard`` hands over the last gradients at the end of the backward pass; ours comes after that."""
        torch.autograd.Variable._execution_engine.queue_callback(At(self, "_ended", task))

    def _ended(self, task: int) -> None:
        """The backward pass came to its end: what it brought counts if it wrote to ``p.grad``."""
        if task != self._task:
            return
        after = self._gradients()
        if after == self._before:  # torch.autograd.grad, for a penalty or an adversarial example
            self._abandon()
            return
        if self.reader is not None:
            try:
                if self._unseen.left:
                    self._not_told()
                self.reader.keep([name for name, mark in after.items() if mark != self._before.get(name)])
            except BaseException:
                self._abandon()
                raise
        self._task, self._marks = None, after
        for origin in self.passes:
            if origin.arriving is not None and (self.keeps_inputs or origin.again):
                origin.gradient = origin.arriving if origin.gradient is None else origin.gradient + origin.arriving
            origin.arriving = None
        for call in self._calls():
            if call.arriving is not None:
                call.weight = call.arriving if call.weight is None else call.weight + call.arriving
                call.arriving = None

    def _abandon(self) -> None:
        """Forget what the backward pass under way has brought so far."""
        if self._task is None:
            return
        self._task = None
        for origin in self.passes:
            origin.arriving = None
            if origin.gradient is None:
                origin.beside, origin.seen = False, None
        for call in self._calls():
            call.arriving = None
        if self.reader is not None:
            self.reader.drop()

    def settle(self) -> None:
        """Leave what counts by now: nothing of a backward pass that raised, or whose gradient is gone from ``p.grad``.

        A gradient is gone if it was set to ``None`` or to zeros.
        """
        self._abandon()
        if self._marks and not any(self._stands(name, mark) for name, mark in self._marks.items()):
            self._marks = {}
            for origin in self.passes:
                origin.gradient = None
            for call in self._calls():
                call.weight = None
            if self.reader is not None:
                self.reader.clear()

    def _stands(self, name: str, mark: Mark) -> bool:
        parameter = self.parameters().get(name)
        if self.shards is not None and parameter is not None:
            if mark == self.shards.mark(parameter) or self.shards.waits(parameter):
                return True
            if self.nonzero is not None:
                return name in self.nonzero
        gradient = None if parameter is None else parameter.grad
        if gradient is None:
            return False
        return mark == _mark(gradient) or bool(shard_of(gradient).any())

    def _gradients(self) -> dict[str, Mark]:
        """What tells whether a gradient was written since."""
        if self.shards is not None:
            marks = {name: self.shards.mark(p) for name, p in self.parameters().items()}
            return {name: mark for name, mark in marks.items() if mark}
        return {name: _mark(p.grad) for name, p in self.parameters().items() if p.grad is not None}

    def _calls(self) -> list[TapedLoss]:
        own = [origin.own for origin in self.passes if origin.own is not None]
        return [*self.outside, *own, *dict.fromkeys(call for origin in self.passes for call in origin.calls)]

    @contextlib.contextmanager
    def own_pass(self, passes: Iterable[Pass], output: Any) -> Iterator[None]:
        """For backward passes of our own through the user's graph: what arrives in them does not count.

        The user's hooks are not run.

        Args:
            passes: Those whose graph it is.
            output: Where ours begin.
        """
        passes = [origin for origin in passes if origin.recorder is not None]
        outputs = tensors_in([output, *(origin.output for origin in passes)])
        with _LOCK:
            _OWN_PASSES[self.model] = _OWN_PASSES.get(self.model, 0) + 1
        try:
            with torch.enable_grad(), undisturbed(self.parallel), contextlib.ExitStack() as stack:
                stack.enter_context(muted(of_leaves(self.seen().values())))
                if self.shards is not None:
                    stack.enter_context(self.shards.undisturbed())
                for origin in passes:
                    assert origin.recorder is not None
                    stack.enter_context(origin.recorder.hooks.muted(outputs))
                yield
        finally:
            with _LOCK:
                _OWN_PASSES[self.model] -= 1

    # Once more

    @contextlib.contextmanager
    def repeat(
        self,
        origin: Pass,
        *,
        record: bool = True,
        inputs: Inputs | None = None,
        values: Mapping[str, Tensor] | None = None,
        twice: bool = False,
    ) -> Iterator[Pass]:
        """Run a pass of this step again, eagerly, with the random numbers, modes, buffers and autocast it had.

        Buffers, random states and hooks see nothing of it. Reentrant checkpoints run as plain calls, so that what they
        hide is recorded.

        Args:
            origin: One of :attr:`passes`.
            record: Whether the uses of parameters are recorded, which takes a graph; otherwise there is one where
                gradients are enabled.
            inputs: In the place of those it had.
            values: In the places of parameters, by name.
            twice: Whether its graph will be differentiated twice, or forwards.

        Yields:
            The pass, with its output and its graph.
        """
        if self.shards is not None and record:
            raise NotImplementedError(
                "this step needs a second forward pass (of a compiled model, a reentrant checkpoint, "
                "Loop(capture='shadow'), or a method that evaluates the batch again), which is not served under "
                "fully_shard. Use checkpoints with use_reentrant=False and uncompiled modules, or wrap the model in "
                "DistributedDataParallel."
            )
        args, kwargs = inputs or origin.inputs
        device = next(iter(self.parameters().values())).device
        run = lambda: call_forward(self.model, args, kwargs)  # noqa: E731  # neither hooks nor a compiled call
        with (
            settings(self.model, origin.random, device, origin.moment)
            if twice
            else untouched(self.model, device, origin.random, origin.moment),
            plain_checkpoints(),
            autocasting(device, origin.autocast),
            torch.set_grad_enabled(record or torch.is_grad_enabled()),
            no_backward_hooks(self.model) as bare,
        ):
            again = Pass((args, kwargs), origin.random, origin.moment, origin.autocast)
            if record:
                again.recorder = self.recorder((args, kwargs))
                again.recorder.on_loss = partial(called_again, again)
            with again.recorder or contextlib.nullcontext():
                result = run() if values is None else with_values(self.model, values, run)
            bare(result)
            if again.recorder is not None:
                again.recorder.returned(result)
            again.returned = list(tensors_in(result))
            again.output, again.loss = self._expected(result), loss_in(result)
            yield again

    def at_input(self, call: TapedLoss) -> Callable[[Tensor], None]:
        """A hook for what a loss was called on, which tells the reader of the gradient that arrives there."""
        return At(self, "_gradient_at_input", call)

    def _gradient_at_input(self, call: TapedLoss, gradient: Tensor) -> None:
        if self.reader is not None and self.records and not self.inside:
            self.reader.arrived_at_input(call, gradient.detach())

    # What is kept how long

    def _wants(self, module: nn.Module) -> bool:
        if not self.active or inspecting() or self.inside or not torch.is_grad_enabled():
            return False
        return module.training or self.eval_mode

    def _prune(self) -> None:
        """Let go of passes that nothing will arrive at any more."""
        kept = []
        for origin in self.passes:
            waits = any(call.alive() is not None for call in origin.calls) or not origin.calls
            counts = bool(origin.counted) or origin.gradient is not None or origin.own_weight is not None
            if waits and not counts:
                kept.append(origin)
            else:
                release(origin)
                if counts and (self.keeps_inputs or origin.again):
                    kept.append(origin)
        self.passes = kept

    def recorder(self, inputs: Any, tensors: list[Tensor] | None = None) -> Recorder:
        """A recorder of the uses of the tracked parameters in one pass on these inputs.

        Args:
            inputs: Of the model.
            tensors: Buffers and parameters of the model; those that it has, by default.
        """
        parameters = self.seen()
        tracked = {id(p) for p in parameters.values()}
        if tensors is None:
            tensors = [*self.model.buffers(), *self.model.parameters()]
        constants = [t for t in tensors if id(t) not in tracked]
        sizes = [t.shape[0] for t in tensors_in(inputs) if t.dim()]
        number = sizes[self._counting] if self._counting < len(sizes) else batch_size(inputs)
        recorder = Recorder(parameters, constants, number or None)  # there may be no example
        recorder.mark_inputs(inputs)
        return recorder


def _first(tensor: Tensor, hook: OwnHook) -> Any:
    """Register a hook that sees what arrives at a tensor, whatever hooks were registered before make of it."""
    before = dict(tensor._backward_hooks or {})
    if before:
        tensor._backward_hooks.clear()  # type: ignore[union-attr]  # there are some
    handle = ours(tensor.register_hook(hook))
    tensor._backward_hooks.update(before)  # type: ignore[union-attr]  # there is one
    return handle


def _number(value: Tensor) -> int:
    return value.grad_fn._sequence_nr() if value.grad_fn is not None else -1


def _mark(gradient: Tensor) -> Mark:
    return id(gradient), gradient._version
