"""The record of a training step: forward passes, calls of the loss, and the gradients that arrive at them.

There is one set of hooks on a model. Recording a pass, seeing the loss, and the arrival of the user's gradient are
events of one record; whoever needs inputs, uses of parameters, or the batch once more reads it here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.estimation.followed_layer import FollowedLayer
from curvature.estimation.gradient_marks import GradientMarks, Marks, Samples, copied, lengths
from curvature.estimation.gradients_by_hand import Asked, Dropped, divided_in_parts, scale_taken_off
from curvature.estimation.passes import Pass, Reader, TapedLoss
from curvature.estimation.recording import LOCK, Recording
from curvature.estimation.selection import selection
from curvature.estimation.taped_losses import feeding, leading_to, number_of, taped
from curvature.estimation.unseen_losses import UnseenLosses, explained
from curvature.losses.loss import called
from curvature.model.backward_hooks import ours
from curvature.model.backward_under_way import captured, threads_in_backward
from curvature.model.data import Output, inspecting
from curvature.model.fully_sharded import shard_of
from curvature.model.hooks import At, Hook, OwnHook, remove
from curvature.model.trees import tensors_in

Mode = Literal["auto", "loss", "gradient", "shadow"]
MODES: tuple[Mode, ...] = ("auto", "loss", "gradient", "shadow")


class Tape(Recording):
    """Records what a training loop does with a model and its loss, without changing anything that it computes.

    A pass counts when, and only when, its gradient arrived: in a backward pass that ended, which wrote to ``p.grad``,
    where the gradient still stands when the optimizer steps. Everything before that is taken back whole.

    Args:
        model, loss_fn, parameters, output: Those of :class:`~curvature.estimation.taped_model.TapedModel`.
        mode: How the loss is found: ``"auto"``, or only by its call (``"loss"``), by the gradient at the model's output
            (``"gradient"``), or from passes that are repeated after the step's backward passes (``"shadow"``).
        eval_mode: Record passes in eval mode too.
        before_pass: Called before a pass is recorded.

    Attributes:
        reader: Computes statistics while gradients arrive.
        nonzero: Parameters under ``fully_shard`` with a gradient that is not zero in some process, where that is known.
        outside: Calls of the loss that no pass led to.
        elsewhere: A loss counted that parameters led to, and no pass of the model.
        left_out: A loss counts in no curvature, since rounding hides its weight.
        aside: Such a loss had a backward pass of its own.
        earlier: What the gradients of earlier backward passes of the step are known by, when the last one began, where
            some stand.
        by_hand: What stands in ``p.grad`` is made of what backward passes wrote and of gradients that were zeroed, or
            that ``torch.autograd.grad`` returned.
        in_parts: Some gradients were divided by hand, and others were not, or by another number.
        behind: What gradients are known by that stand, while what was seen of their passes was forgotten.
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
        given = model, loss_fn, parameters, output
        super().__init__(*given, shadows=mode == "shadow", eval_mode=eval_mode, before_pass=before_pass)
        self.mode = mode
        self.reader = Reader()
        self.nonzero: frozenset[str] | None = None
        self.outside: list[TapedLoss] = []
        self.in_parts = self.by_hand = self.elsewhere = self.aside = self.left_out = False
        self.behind: tuple[Marks, Samples] | None = None
        self._task: int | None = None  # the user's backward pass under way
        self._claim: tuple[int, int] | None = None  # that pass and its thread, until it has ended
        self._unseen = UnseenLosses(self.loss_module)
        self._gradients = GradientMarks(parameters, self.shards)
        self._before: Marks = {}  # of the gradients when it began
        self._marks: Marks = {}  # when the last one ended
        self._samples: Samples = {}  # likewise
        self.earlier: dict[str, float] = {}
        self._weights: list[tuple[TapedLoss | Pass, Tensor | None, frozenset[str]]] = []  # likewise, of what it brought
        self._asked: Asked | None = None  # that pass, or the last one, is torch.autograd.grad for some of them
        self._catching: list[Any] = []  # hooks that see what it finds
        self._watching: list[Any] = []  # hooks that see what is accumulated
        self._dropped = Dropped()
        self._followed: weakref.WeakSet[FollowedLayer] = weakref.WeakSet()
        self.attach()

    # Life

    def attach(self) -> None:
        super().attach()
        if self.loss_module is not None:
            self.handles.append(self.loss_module.register_forward_hook(Hook(self, "_after_loss"), with_kwargs=True))

    def follow(self, layer: FollowedLayer) -> None:
        """Tell of every pass through one layer of the model, in steps in which nothing is recorded too."""
        layer.attach()
        self._followed.add(layer)

    def close(self) -> None:
        for layer in self._followed:
            layer.close()
        super().close()

    def clear(self) -> None:
        super().clear()
        remove(self._catching)
        remove(self._watching)
        self.outside, self._task, self._marks, self.nonzero = [], None, {}, None
        self._samples, self.earlier, self._weights = {}, {}, []
        self._asked, self._dropped, self.behind = None, Dropped(), None
        self.in_parts = self.by_hand = self.elsewhere = self.aside = self.left_out = False

    # Calls of the loss

    def _after_loss(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        """The loss module was called, by the loop or inside the model's own forward."""
        if self.running is not None and self.here.latest() is value:
            return  # it called one of torch's functions, which was seen already
        self._called(module, args, kwargs, value)

    def function_called(self, func: Any, args: Any, kwargs: Any, value: Any) -> None:
        """One of torch's loss functions was called inside the model's forward."""
        found = called(func, args, kwargs)
        if found is not None:
            self._called(found[0], found[1], {}, value)

    def _called(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if not self.active or self.mode == "gradient" or inspecting() or self.inside:
            return
        if not isinstance(value, Tensor) or not value.requires_grad:
            return
        z = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if not any(t.requires_grad for t in tensors_in(z)):
            return
        passes = [self.running] if self.running is not None else leading_to(z, self.passes, self.seen().values())
        if passes is None:
            return
        call = taped(module, args, kwargs, z, value.detach(), passes, self.running is not None)
        if len(passes) == 1 and isinstance(z, Tensor) and self.keeps_inputs and not call.whole:
            with self.own_pass(passes, z):
                call.selection = selection(passes[0].returned, z)
        call.looked, call.number = self.keeps_inputs, number_of(value)
        hook = At(self, "_gradient_at_loss", call)
        ours(value.register_hook(hook))
        call.alive, self.here.latest = weakref.ref(hook), weakref.ref(value)
        if not passes:
            self.outside.append(call)
        if self.records:
            self.reader.called(call)

    def feeding(self, passes: list[Pass]) -> list[Pass]:
        """Further passes, whose outputs are inputs of these."""
        return feeding(passes, self.passes, self.seen().values())

    # Gradients

    def listen(self, origin: Pass, own: Tensor | None = None) -> None:
        if not self._watching and self.shards is None and self.parallel is None:
            leaves = [p for p in self.parameters().values() if p.requires_grad and p.is_leaf]
            for p in (leaves[:1] + leaves[-1:])[: len(leaves)]:  # one that is shared is most likely at an end
                hook = At(self, "_accumulated", "")
                self._watching.append(ours(p.register_post_accumulate_grad_hook(hook)))
        if own is not None and own.requires_grad:
            origin.own = taped(self.model, (), {}, None, own.detach(), [], True)
            hook = At(self, "_gradient_at_own_loss", origin)
            ours(own.register_hook(hook))
            origin.own.alive = weakref.ref(hook)
        if isinstance(origin.output, Tensor) and origin.output.requires_grad and self.mode != "loss":
            if origin.at_output is not None:
                origin.at_output.remove()
            origin.at_output = _first(origin.output, At(self, "_gradient_at_output", origin))

    def _gradient_at_loss(self, call: TapedLoss, gradient: Tensor) -> None:
        if self.inside or not self.active:
            return
        self._enter()
        gradient = gradient.detach()
        call.arriving = _sum(call.arriving, gradient)
        if self.records:
            self.reader.arrived(call, gradient)

    def _gradient_at_own_loss(self, origin: Pass, gradient: Tensor) -> None:
        """Of a model in which nobody saw the losses that it consists of: it is run again."""
        if self.inside or not self.active or self.mode == "loss":
            return
        self._enter()
        assert origin.own is not None
        origin.own.arriving = _sum(origin.own.arriving, gradient.detach())
        origin.again = True

    def _gradient_at_output(self, origin: Pass, gradient: Tensor) -> None:
        if self.inside or not self.active:
            return
        self._enter()
        if self.records:
            self.reader.arrives_at_output(origin)
        seen = [call for call in origin.calls if call.arriving is not None]
        kept = self.keeps_inputs or origin.again or origin.opaque
        unseen = self._unseen.above(origin, bool(seen), kept)
        if unseen is None:
            return
        self.left_out |= origin.left_out
        besides = bool(unseen) or (bool(seen) and (origin.labelled or origin.penalty or origin.form is not None))
        origin.beside |= len(unseen) + origin.labelled > 1 or (besides and bool(seen))
        origin.unseen_loss = unseen[0] if len(unseen) == 1 and origin.gradient is None else None
        origin.task, origin.edited = torch._C._current_graph_task_id(), origin.output.grad_fn is not origin.end
        if any(not call.moved for call in unseen):
            return self._not_told()
        if seen and besides:
            with self.own_pass([origin], origin.output):
                part = explained(origin.output, seen)
            if part is not None:
                origin.size, gradient, seen = gradient.abs().amax(), gradient - part, []
            elif not origin.penalty:
                return self._not_told()
            else:
                origin.beside, self.left_out = False, self.left_out or not origin.silent
        if any(call.whole for call in seen):
            return
        if kept:
            gradient = gradient.detach()
            origin.seen = origin.output.detach()
            origin.arriving = _sum(origin.arriving, gradient)
        if seen and origin.recorder is not None:
            return  # the calls of the loss have told already
        if self.records:
            self.reader.arrived_at_output(origin, gradient.detach())
        self.left_out |= origin.left_out
        if origin.again and not kept:  # what other losses tell comes after it
            self._unseen.read_later(origin)
            origin.seen, origin.arriving = origin.output.detach(), gradient.detach()

    def _not_told(self) -> None:
        if self.records:
            self.reader.not_told()

    def _enter(self) -> None:
        """A gradient of the user's backward pass arrived: the first one begins a transaction."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        with LOCK:
            if self.busy_elsewhere():
                raise _two_at_once()
            self._claim = task, threading.get_ident()
        self.earlier = self.settle()
        self._task, self._before = task, self._gradients.now()
        if self.aside:  # unless somebody has taken it back since
            self.aside = any(lengths(self._gradients.samples(self._before)).values())
        if captured(self.seen().values()):
            self._asked = Asked(self._before, self._gradients.samples())
            if self.shards is None:
                for name, p in self.parameters().items():
                    if p.requires_grad:
                        self._catching.append(ours(p.register_hook(At(self, "_found_for", name))))
        if self.mode != "loss":
            self._unseen.look(self.passes, self.calls(), self.seen().values())
        ended = "_ended" if self.shards is None else "_nearly_ended"
        torch.autograd.Variable._execution_engine.queue_callback(At(self, ended, task))
        self.reader.begin()

    def busy_elsewhere(self) -> bool:
        if self._claim is None or self._claim[0] == torch._C._current_graph_task_id():
            return False
        running = threads_in_backward()
        # The threads of an accelerator belong to torch, and run the hooks of all backward passes.
        if isinstance(threading.current_thread(), threading._DummyThread):
            return len(running) > 1
        return self._claim[1] in running - {threading.get_ident()}

    def _accumulated(self, _: str, parameter: Tensor) -> None:
        """A backward pass wrote a gradient: maybe one of another model that has layers of this one."""
        if self.inside or not self.active or torch._C._current_graph_task_id() == self._task:
            return
        if self._claim is None and self.mode != "loss" and not self.aside:  # no checkpoint's own, inside of another
            self._unseen.look(self.passes, self.calls(), self.seen().values())
            self.aside = self._unseen.elsewhere

    def _found_for(self, name: str, gradient: Tensor) -> None:
        if self._asked is not None and torch._C._current_graph_task_id() == self._task:
            self._asked.found |= copied({name: shard_of(gradient.detach())})

    @property
    def under_way(self) -> bool:
        """Whether gradients that arrive now are of the user's backward pass that began last."""
        return not self.inside and torch._C._current_graph_task_id() == self._task

    def _nearly_ended(self, task: int) -> None:
        """``fully_shard`` hands over the last gradients at the end of the backward pass; ours comes after that."""
        torch.autograd.Variable._execution_engine.queue_callback(At(self, "_ended", task))

    def _ended(self, task: int) -> None:
        """The backward pass came to its end: what it brought counts if it wrote to ``p.grad``."""
        if task != self._task:
            return
        try:
            self._take_in()
        finally:
            self._claim = None

    def _take_in(self) -> None:
        task = self._task
        remove(self._catching)
        after = self._gradients.now()
        brought: list[TapedLoss | Pass] = [call for call in self.calls() if call.arriving is not None]
        brought = brought or [origin for origin in self.passes if origin.task == task]
        if after != self._before:
            self._asked = None
            self._keep(brought, after)
        elif self._asked is None:  # torch.autograd.grad, for an adversarial example
            self._abandon()
        else:
            self._asked.brought = brought  # whatever becomes of them

    def _keep(self, brought: list[TapedLoss | Pass], after: Marks, written: frozenset[str] = frozenset()) -> None:
        """What a backward pass that ended brought counts: it stands in ``p.grad``."""
        written |= {name for name, mark in after.items() if mark != self._before.get(name)}
        try:  # whatever may raise comes first
            samples = self._gradients.samples(after)
            calls = [(call, _sum(call.weight, call.arriving)) for call in self.calls()]
            passes = [(origin, _sum(origin.gradient, origin.arriving)) for origin in self.passes]
            for origin in self.passes:
                if origin.looks is not None:
                    self._unseen.others_told(origin)
            if self._unseen.left:
                self._not_told()
            self.reader.keep(written, brought)
        except BaseException:
            self._abandon()
            raise
        self._dropped.counted(brought)
        self.elsewhere |= self._unseen.elsewhere
        self._task, self._marks, self._samples = None, after, samples
        self._weights = [(origin, origin.gradient, origin.brought) for origin, _ in passes]
        self._weights += [(call, call.weight, call.brought) for call, _ in calls]
        for one in brought:
            one.brought |= written
        for origin, arrived in passes:
            if origin.arriving is not None and (self.keeps_inputs or origin.again):
                origin.gradient = arrived
            origin.arriving = None
        for call, arrived in calls:
            if call.arriving is not None:  # unless it has counted already, for other parameters
                call.weight, call.arriving = arrived, None

    def _decide(self) -> None:
        """See whether what ``torch.autograd.grad`` found for parameters was written to ``p.grad``: it counts then."""
        asked, self._asked = self._asked, None
        if asked is None or not asked.brought:
            return self._abandon()
        after, samples = self._gradients.now(), self._gradients.samples()
        in_place = not self._marks and asked.replaced(samples, self._eps)  # of those of an earlier step
        if in_place or (after != asked.marks and asked.taken(samples, self._eps)):
            return self._keep(list(asked.brought), after, frozenset(asked.found if in_place else ()))
        self._dropped.add({one for one in asked.brought if not _is_of_inputs(one)}, asked.found)
        self._abandon()

    @property
    def _eps(self) -> float:
        return max(torch.finfo(p.dtype).eps for p in self.parameters().values())

    def _abandon(self) -> None:
        """Forget what the backward pass under way has brought so far."""
        if self._task is None:
            return
        remove(self._catching)
        self._task = self._asked = None
        for origin in self.passes:
            origin.arriving = None
            if origin.gradient is None:
                origin.beside, origin.seen = False, None
        for call in self.calls():
            call.arriving = None
        self.reader.drop()

    def settle(self) -> dict[str, float]:
        """Leave what counts by now: nothing of a backward pass that raised, or whose gradient is gone from ``p.grad``.

        A gradient is gone if it was set to ``None`` or to zeros, or to what it was when the last backward pass began.

        Returns:
            What the gradients of earlier backward passes of the step that stand are known by, in numbers.
        """
        if self.busy_elsewhere():
            raise _two_at_once()
        self._decide()
        if self.behind is not None:
            marks, samples = self.behind
            gone = self._gradients.gone(marks, samples, lengths(self._gradients.samples(marks)), self.nonzero)
            stand = {name: mark for name, mark in marks.items() if name not in gone}
            self.behind = (stand, samples) if stand else None
        if not self._marks:
            return {}
        samples, was = self._gradients.samples(self._marks), self._samples
        now = lengths(samples)
        gone = self._gradients.gone(self._marks, was, now, self.nonzero)
        if gone == self._marks.keys():
            self._marks = {}
            left = [call for call in self.calls() if call.weight is not None]
            found: list[TapedLoss | Pass] = [*left] or [o for o in self.passes if o.gradient is not None]
            self._dropped.add({one for one in found if not _is_of_inputs(one)}, was)
            for origin in self.passes:
                origin.gradient, origin.brought = None, frozenset()
            for call in self.calls():
                call.weight, call.brought = None, frozenset()
            self.reader.clear()
            return {}
        if gone:
            self._marks = {name: mark for name, mark in self._marks.items() if name not in gone}
            both: list[TapedLoss | Pass] = [*self.passes, *self.calls()]
            for one in both:
                one.brought -= gone
            self.reader.gone(self._marks)
        elif self.earlier and {name: x for name, x in now.items() if x} == self.earlier and now != lengths(was):
            for known, weight, brought in self._weights:
                known.brought = brought
                setattr(known, "weight" if isinstance(known, TapedLoss) else "gradient", weight)
            self._samples = samples  # they are what they were then, and divided by nothing
            self.reader.take_back()
        elif self._dropped and self.parallel is None:
            self.by_hand |= self._dropped.explain(samples, was, self._eps)
        self.earlier = {}
        return {name: x for name, x in now.items() if x and name not in gone}

    def divided_by(self) -> float:
        """What the gradients that stand were divided by since the last backward pass of the step wrote them.

        Clipping does not count, but the scale of a GradScaler does that was taken off before.
        """
        self.settle()
        if not self._marks or self.shards is not None:
            return 1.0
        weights = [call.weight for call in self.calls() if call.weight is not None and call.weight.dim() == 0]
        now = self._gradients.samples(self._marks)
        self.in_parts |= divided_in_parts(now, self._samples, self._eps)
        return scale_taken_off(now, self._samples, weights, self._eps)

    def standing(self) -> tuple[Marks, Samples] | None:
        """What the gradients of the step that count by now are known by; ``None`` where there are none."""
        self.settle()
        return (self._marks, self._samples) if self._marks else self.behind

    def calls(self) -> list[TapedLoss]:
        """All calls of the loss in the passes of the step."""
        own = [origin.own for origin in self.passes if origin.own is not None]
        return [*self.outside, *own, *dict.fromkeys(call for origin in self.passes for call in origin.calls)]

    def at_input(self, call: TapedLoss) -> Callable[[Tensor], None]:
        """A hook for what a loss was called on, which tells the reader of the gradient that arrives there."""
        return At(self, "_gradient_at_input", call)

    def _gradient_at_input(self, call: TapedLoss, gradient: Tensor) -> None:
        if self.records and not self.inside:
            self.reader.arrived_at_input(call, gradient.detach())


def _two_at_once() -> RuntimeError:
    return RuntimeError(
        "a backward pass through this model runs in another thread. What each brings to p.grad, and what it was for, "
        "could not be told apart. Let the threads take turns from backward() to its end, and step() when all have "
        "ended (a threading.Lock around loss.backward()), or add their losses and call backward() once."
    )


def _first(tensor: Tensor, hook: OwnHook) -> Any:
    """Register a hook that sees what arrives at a tensor, whatever hooks were registered before make of it."""
    before = dict(tensor._backward_hooks or {})
    if before:
        tensor._backward_hooks.clear()  # type: ignore[union-attr]  # there are some
    handle = ours(tensor.register_hook(hook))
    tensor._backward_hooks.update(before)  # type: ignore[union-attr]  # there is one
    return handle


def _sum(before: Tensor | None, arriving: Tensor | None) -> Tensor | None:
    """What has arrived in all."""
    return before if arriving is None else arriving if before is None else before + arriving


def _is_of_inputs(one: TapedLoss | Pass) -> bool:
    """Whether gradients of inputs were asked for: an adversarial example, or the step of a generator."""
    passes = one.passes if isinstance(one, TapedLoss) else [one]
    return any(t.requires_grad for origin in passes for t in tensors_in(origin.inputs))
