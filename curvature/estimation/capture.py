"""Statistics out of a plain training loop: hooks that watch the user's own forward and backward passes."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvature.estimation.collector import Collector
from curvature.estimation.recording import Pass, Recording, Waiting, merged
from curvature.layers.recorder import Recorder
from curvature.losses import JoinedTerms, Loss, Terms, UnknownLossError, WeightedSum, loss_for
from curvature.losses.from_gradient import from_output_gradient
from curvature.losses.signals import Signals
from curvature.model.data import Output, batch_size, inspecting, inspection, resolve_output, tensors_in, untouched
from curvature.model.hooks import Hook, calling_frame
from curvature.model.wrappers import is_compiled, plain_checkpoints, unwrapped
from curvature.structures.estimator import Curvature

Mode = Literal["auto", "loss", "gradient", "shadow"]


class Capture:
    """Collects curvature statistics while the user's loop runs, without changing anything the loop computes.

    While armed, a forward pass in train mode with gradients enabled is recorded. Then

    * the *loss tap*, a hook on the loss module, sees outputs and targets exactly as passed and runs the pass for the
      statistics;
    * failing that the *gradient tap*, a hook on the model's output, reads mask, class axis and labels off the gradient
      that arrives there and runs the pass inside the user's backward;
    * failing that the *shadow pass* repeats the forward pass on the stored inputs (compiled models, whose graphs cannot
      be recorded; reentrant checkpoints, which hide their inside and are noticed by the gradients they leave).

    Args:
        model: The module the user calls; wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss module the user calls, or one that describes what the model computes inside.
        collector: Receives the statistics.
        curvature: What is estimated.
        output: Picks the output tensor where the model returns something else.
        class_dim: Class axis of the output, where it cannot be read off.
        mode: ``"auto"``, or one of the three ways.
        eval_mode: Record passes in eval mode too (deliberate fine-tuning without dropout).
        before_pass: Called before a pass is recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        collector: Collector,
        curvature: Curvature,
        *,
        output: Output | None = None,
        class_dim: int | None = None,
        mode: Mode = "auto",
        eval_mode: bool = False,
        before_pass: Callable[[], None] | None = None,
    ) -> None:
        if mode not in ("auto", "loss", "gradient", "shadow"):
            raise ValueError(f"capture must be 'auto', 'loss', 'gradient' or 'shadow', got {mode!r}.")
        self.called, self.model = model, unwrapped(model)
        self.collector, self.curvature = collector, curvature
        self.output, self.class_dim, self.mode, self.eval_mode = output, class_dim, mode, eval_mode
        self.before_pass = before_pass
        self.loss = _interpreted(loss_fn, curvature)
        self.loss_module = loss_fn if isinstance(loss_fn, nn.Module) else None
        self.armed = False
        self.batches = 0  # batches collected since arming
        self.reached: set[str] = set()
        self.generator = torch.Generator(device=collector.parameters.device)
        self._recordings: list[Recording] = []
        self._waiting: list[Waiting] = []
        self.passes: list[Pass] = []  # since arming, in case they must be repeated
        self._current: Recorder | None = None
        self._frame: FrameType | None = None  # of the call of the model that is being recorded
        self.compiled = False  # a call of the model ran compiled code
        self._hidden = False  # a pass was seen that hides parts of the model
        self.settled = False  # a pass was seen that hides none
        self._elsewhere: set[str] = set()  # parameters that are used outside the model's forward pass
        self._handles: list[Any] = []
        self.attach()

    # Life

    def attach(self) -> None:
        """Register the hooks (done at construction)."""
        self.close()
        target = self.called if is_compiled(self.called) else self.model
        self._handles = [
            target.register_forward_pre_hook(Hook(self, "_before_forward"), with_kwargs=True),
            target.register_forward_hook(Hook(self, "_after_forward"), with_kwargs=True, always_call=True),
        ]
        if self.loss_module is not None:
            self._handles.append(self.loss_module.register_forward_hook(Hook(self, "_after_loss"), with_kwargs=True))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stop()

    def arm(self, seed: int) -> None:
        """Collect from the passes that follow; ``seed`` starts the draws of this step."""
        self.armed = True
        self.generator.manual_seed(seed)
        self.forget()

    def disarm(self) -> None:
        """Stop collecting."""
        self.armed = False
        self.forget()

    def forget(self) -> None:
        """Drop recorded activations and the count of batches."""
        self._stop()
        self._keep(lambda recording: False)
        for waiting in self._waiting:
            waiting.backward.close()
        self._waiting = []
        self.passes, self.batches, self.reached = [], 0, set()
        self.collector.forget()

    @property
    def shadows(self) -> bool:
        """Whether statistics come from a shadow pass in :meth:`finish`."""
        if self.mode != "auto":
            return self.mode == "shadow"
        return self.compiled or self._hidden or is_compiled(self.called)

    # Hooks

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._wants(module) or self._is_running():
            return
        self._stop()
        if self.before_pass is not None:
            self.before_pass()
        self._keep(lambda recording: not recording.used or self.shadows)
        if self.shadows:
            return
        self._current = self._recorder((args, kwargs))
        self._frame = calling_frame()
        self._current.__enter__()

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if self._is_running() and self._frame is not calling_frame():
            return
        recorder = self._current
        self._stop()
        if result is None or not self._wants(module) or (recorder is None and not self.shadows):
            return  # the forward pass raised, or is not wanted
        try:
            z = self._seen_by_the_loss(result)
        except TypeError:
            if self.output is not None:
                raise
            z = None  # the loss tap will see the tensor
        edges = tuple(get_gradient_edge(t) for t in tensors_in(result) if t.requires_grad)
        recording = Recording(recorder or self._recorder(None), Pass((args, kwargs)), z, edges)
        self._recordings.append(recording)
        self.passes.append(recording.origin)
        several = isinstance(self.loss, WeightedSum)  # whose gradients a hook on an output could not tell apart
        if isinstance(z, Tensor) and z.requires_grad and self.mode != "loss" and not several:
            recording.handles.append(z.register_hook(_OutputHook(self, recording)))

    def _seen_by_the_loss(self, result: Any) -> Any:
        """The tensor that the loss is called on, or all that a sum of losses is."""
        if isinstance(self.loss, WeightedSum):
            return result if self.output is None else self.output(result)
        return resolve_output(result, self.output)

    def _is_running(self) -> bool:
        """Whether the call that is being recorded has not returned: the model calls itself."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return self._current is not None and frame is not None

    def _keep(self, wanted: Callable[[Recording], bool]) -> None:
        kept = [recording for recording in self._recordings if wanted(recording)]
        for recording in self._recordings:
            if recording not in kept:
                recording.release()
        self._recordings = kept

    def _stop(self) -> None:
        """Leave the recorder: the forward pass ended, or (a keyboard interrupt runs no hooks) was given up."""
        recorder, self._current, self._frame = self._current, None, None
        if recorder is not None:
            recorder.__exit__(None, None, None)

    def _after_loss(self, module: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if not self._recordings or not self.armed or self.mode == "gradient":
            return
        if not torch.is_grad_enabled() or inspecting():
            return
        arguments = [*args, *kwargs.values()]
        z = arguments[0] if args else kwargs.get("input", arguments[0] if arguments else None)
        if not isinstance(z, Tensor) and not isinstance(self.loss, WeightedSum):
            return
        if not any(t.requires_grad for t in tensors_in(z)):
            return
        for recording in self._recordings:
            if recording.output is z:
                others = {key: None if value is z else value for key, value in kwargs.items()}
                recording.origin.losses.append((tuple(None if a is z else a for a in args), others))
        if self.shadows:
            return
        if self.loss is None:
            self._wait_for_backward(z, loss)
            return
        rest = [a for a in arguments if a is not z]
        terms = self.loss.terms(z, *rest, as_called=True)
        recordings = self._leading_to(terms.output)
        if isinstance(terms, JoinedTerms) or not self._wait_for_gradients(recordings, terms, loss):
            self._collect(recordings, terms)

    def _wait_for_gradients(self, recordings: list[Recording], terms: Terms, loss: Any) -> bool:
        """Empirical statistics from the user's own backward pass, where a pass of our own would bring nothing new."""
        if self.curvature.kind != "empirical" or terms.reduction == "none" or not isinstance(loss, Tensor):
            return False
        if not recordings or any(recording.total is not None for recording in recordings):
            self._part(recordings)
            return False
        recorder = merged([r.recorder for r in recordings])
        signals = Signals(terms, "empirical", batch=recorder.batch, together=True)
        backward = self.collector.await_backward(recorder, signals)
        if backward is None:
            return False
        for recording in recordings:
            recording.used, recording.total = True, terms.total
        waiting = Waiting(backward, recordings, terms)
        handle = loss.register_hook(waiting.note_scale)
        for recording in recordings:
            recording.handles.append(handle)
        self._waiting.append(waiting)
        return True

    def _part(self, recordings: list[Recording]) -> None:
        """A second loss on a pass: the gradients of both would arrive as one, so the first gets a pass of its own."""
        for waiting in [w for w in self._waiting if w.scale is None and w.shares(recordings)]:
            self._waiting.remove(waiting)
            waiting.backward.close()
            for recording in waiting.recordings:
                recording.total = None
            self._collect(waiting.recordings, waiting.terms)

    def _leading_to(self, z: Tensor) -> list[Recording]:
        """The recorded passes that ``z`` was computed from."""
        edges = [edge for recording in self._recordings for edge in recording.edges]
        if len(self._recordings) == 1 or not edges:
            return list(self._recordings)
        gradients: tuple[Tensor | None, ...] = tuple(torch.empty(0) for _ in edges)
        with self._own_pass():
            gradients = torch.autograd.grad(z, edges, torch.ones_like(z), retain_graph=True, allow_unused=True)
        reached = {edge for edge, gradient in zip(edges, gradients, strict=True) if gradient is not None}
        return [r for r in self._recordings if not r.edges or not reached.isdisjoint(r.edges)]

    def _wait_for_backward(self, z: Tensor, loss: Any) -> None:
        """Empirical statistics of a loss nobody interprets: from the gradient the user's backward brings."""
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            raise ValueError(
                "an empirical Fisher of a loss of unknown type needs the loss as one number: use reduction='mean' or "
                f"'sum', not a result of shape {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)}."
            )
        scale: list[Tensor] = []
        recordings = self._leading_to(z)
        for recording in recordings:
            recording.used = True
        reduction = getattr(self.loss_module, "reduction", "mean")

        def on_output(gradient: Tensor) -> None:
            if not self.armed or inspecting():
                return
            terms = from_output_gradient(None, z, gradient, scale[0] if scale else None, reduction, self.class_dim)
            self._collect(recordings, terms)

        loss.register_hook(lambda gradient: scale.append(gradient.detach()))
        handle = z.register_hook(on_output)
        for recording in recordings:
            recording.handles.append(handle)

    def _output_gradient(self, recording: Recording, gradient: Tensor) -> None:
        """The gradient tap."""
        if not self.armed or inspecting():
            return
        if not bool(torch.isfinite(gradient).all()):
            return  # nothing can be read off it, and the step will be skipped
        assert recording.output is not None
        if self.shadows or not self.settled:
            recording.origin.output, recording.origin.output_gradient = recording.output.detach(), gradient.detach()
        if self.shadows or recording.used:
            return
        terms = self._terms_from_gradient(recording.output, gradient)
        self._collect([recording], terms)

    # Statistics

    def _terms_from_gradient(self, z: Tensor, gradient: Tensor, arrived_at: Tensor | None = None) -> Terms:
        if self.loss is None and self.mode == "auto":
            raise TypeError(
                "an empirical Fisher from the gradient at the model's output has the scale of whatever backward() is "
                "called on, which a loss of unknown type does not tell. Give the optimizer the loss module that the "
                "loop calls, or set capture='gradient' for a mean loss that is neither accumulated nor scaled."
            )
        return from_output_gradient(
            self.loss,
            z,
            gradient,
            None,
            "mean",
            self.class_dim,
            empirical=self.curvature.kind == "empirical",
            arrived_at=arrived_at,
        )

    def _collect(self, recordings: list[Recording], terms: Terms) -> None:
        if not recordings:
            return
        recorder = merged([r.recorder for r in recordings])
        first = recordings[0]
        # Several losses on one pass: each has its own divisor, and inputs count once.
        scale = None if first.total is None else (first.total / terms.total).sqrt()
        signals = Signals.of(
            terms, self.curvature.kind, self.curvature.samples, self.generator, recorder.batch, together=True
        )
        reached: set[str] = set()
        with self._own_pass():
            reached = self.collector.collect(
                recorder, terms.output, signals, counted=first.counted, scale=scale, weight=first.total
            )
        if not reached:
            return  # a loss of something else
        total = terms.total if first.total is None else first.total
        for recording in recordings:
            recording.used, recording.counted = True, first.counted
            recording.total = total if recording.total is None else recording.total
        self.batches += 1
        self.reached |= reached

    @contextlib.contextmanager
    def _own_pass(self) -> Iterator[None]:
        """For passes of our own through the user's graph, which a reentrant checkpoint refuses."""
        try:
            with inspection(), torch.enable_grad():
                yield
        except RuntimeError as error:
            if self.mode != "auto" or "use_reentrant" not in str(error):
                raise
            self._hidden = True
            self._start_again()

    def finish(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Run what can only be done after the backward pass: the shadow passes.

        Args:
            gradients: Gradients of the step by name. If one is nonzero although no recorded pass reached its
                parameter, the pass hides parts of the model, and is repeated in the open, now and from now on.
        """
        self._read_gradients()
        self._keep(lambda recording: False)
        missing = set() if self.shadows or self.mode != "auto" else self._missing(gradients or {})
        if missing:
            self._hidden = True
            self._start_again()
        if self.shadows:
            for origin in self.passes:
                self.repeat(origin)
        if missing and self.batches:
            self._elsewhere |= self._missing(gradients or {})
            self._hidden = not missing <= self._elsewhere
        self.collector.settle()
        self.settled = bool(self.batches)
        self.passes = []

    def _read_gradients(self) -> None:
        """Statistics from the backward passes that were waited for."""
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            item.backward.close()
            if item.scale is None:
                continue  # no backward pass came
            counted = item.recordings[0].counted
            reached = self.collector.collect_backward(item.backward, item.factor, counted)
            if reached:
                self.batches += 1
                self.reached |= reached

    def _missing(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Parameters with a gradient that no statistics explain."""
        estimators = self.collector.estimators
        found = {part.name for name in self.reached for part in estimators[name].block.parts}
        return {n for n, g in gradients.items() if n not in found | self._elsewhere and bool(g.any())}

    def _start_again(self) -> None:
        for estimator in self.collector.estimators.values():
            estimator.discard()
        self.collector.forget()
        self.batches, self.reached = 0, set()

    def repeat(self, origin: Pass) -> None:
        """Repeat a forward pass on its stored inputs, eagerly, and collect from that."""
        if not origin.losses and origin.output_gradient is None:
            return
        args, kwargs = origin.inputs
        with untouched(self.model), plain_checkpoints():
            recorder = self._recorder((args, kwargs))
            forward = self.model.forward  # neither hooks nor a compiled call
            with torch.enable_grad(), recorder:
                result = forward(*args, **kwargs)
            z = self._seen_by_the_loss(result)
            recording = Recording(recorder, origin, z)
            if origin.losses and self.loss is not None:
                for positional, named in origin.losses:
                    rest = [a for a in (*positional, *named.values()) if a is not None]
                    self._collect([recording], self.loss.terms(z, *rest, as_called=True))
            elif origin.output_gradient is not None:
                terms = self._terms_from_gradient(z, origin.output_gradient, origin.output)
                self._collect([recording], terms)

    def _wants(self, module: nn.Module) -> bool:
        if not self.armed or inspecting() or not torch.is_grad_enabled():
            return False
        return module.training or self.eval_mode

    def _recorder(self, inputs: Any) -> Recorder:
        parameters = self.collector.parameters
        tracked = {id(p) for p in parameters.values()}
        constants = [*self.model.buffers(), *(p for p in self.model.parameters() if id(p) not in tracked)]
        recorder = Recorder(parameters, constants, batch_size(inputs))
        if inputs is not None:
            recorder.mark_inputs(inputs)
        return recorder


def _interpreted(loss_fn: Any, curvature: Curvature) -> Loss | None:
    """The loss as an object; an empirical Fisher does without."""
    try:
        return loss_for(loss_fn)
    except UnknownLossError:
        if curvature.kind == "empirical":
            return None
        raise


class _OutputHook:
    """The gradient tap of one recorded pass."""

    def __init__(self, owner: Capture, recording: Recording) -> None:
        self._owner = weakref.ref(owner)
        self._recording = recording

    def __call__(self, gradient: Tensor) -> None:
        owner = self._owner()
        if owner is not None:
            owner._output_gradient(self._recording, gradient)
