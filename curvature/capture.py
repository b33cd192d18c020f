"""Statistics out of a plain training loop: hooks that watch the user's own forward and backward passes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from curvature.collector import Collector
from curvature.data import Output, resolve_output, untouched
from curvature.estimator import Curvature
from curvature.inference import from_output_gradient
from curvature.losses import Loss, Terms, UnknownLossError, loss_for
from curvature.recorder import Recorder, batch_size
from curvature.signals import Signals

Mode = Literal["auto", "loss", "gradient", "shadow"]


@dataclass
class Recording:
    """One recorded forward pass of the model."""

    recorder: Recorder
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor | None
    used: bool = False
    total: Tensor | None = None  # divisor of the first loss that saw it
    counted: set[Any] = field(default_factory=set)
    seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # what the loss was called with on the output itself
    output_gradient: Tensor | None = None


class Capture:
    """Collects curvature statistics while the user's loop runs, without changing anything the loop computes.

    While armed, a forward pass in train mode with gradients enabled is recorded. Then

    * the *loss tap*, a hook on the loss module, sees outputs and targets exactly as passed and runs the pass for the
      statistics;
    * failing that the *gradient tap*, a hook on the model's output, reads mask, class axis and labels off the gradient
      that arrives there and runs the pass inside the user's backward;
    * failing that the *shadow pass* repeats the forward pass on the stored inputs (compiled models, whose graphs cannot
      be recorded; checkpoints that hide their inside).

    Args:
        model: The module the user calls; wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss module the user calls, or one that describes what the model computes inside.
        collector: Receives the statistics.
        curvature: What is estimated.
        output: Picks the output tensor where the model returns something else.
        class_dim: Class axis of the output, where it cannot be read off.
        mode: ``"auto"``, or one of the three ways.
        eval_mode: Record passes in eval mode too (deliberate fine-tuning without dropout).
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
    ) -> None:
        if mode not in ("auto", "loss", "gradient", "shadow"):
            raise ValueError(f"capture must be 'auto', 'loss', 'gradient' or 'shadow', got {mode!r}.")
        self.called, self.model = model, unwrapped(model)
        self.collector, self.curvature = collector, curvature
        self.output, self.class_dim, self.mode, self.eval_mode = output, class_dim, mode, eval_mode
        self.loss = _interpreted(loss_fn, curvature)
        self.loss_module = loss_fn if isinstance(loss_fn, nn.Module) else None
        self.armed = False
        self.batches = 0  # batches collected since arming
        self.reached: set[str] = set()
        self.generator = torch.Generator(device=collector.parameters.device)
        self._recordings: list[Recording] = []
        self._current: Recorder | None = None
        self._busy = False
        self._handles: list[Any] = []
        self.attach()

    # Life

    def attach(self) -> None:
        """Register the hooks (done at construction)."""
        self.close()
        target = self.called if is_compiled(self.called) else self.model
        before, after = _Hook(self, "_before_forward"), _Hook(self, "_after_forward")
        if getattr(target, "_compiled_call_impl", None) is not None:
            # module.compile() compiles the hooks as well: a graph break keeps them.
            before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        self._handles = [
            target.register_forward_pre_hook(before, with_kwargs=True),
            target.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        if self.loss_module is not None:
            self._handles.append(self.loss_module.register_forward_hook(_Hook(self, "_after_loss"), with_kwargs=True))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
        self._recordings, self.batches, self.reached = [], 0, set()

    @property
    def shadows(self) -> bool:
        """Whether statistics come from a shadow pass in :meth:`finish`."""
        return self.mode == "shadow" or (self.mode == "auto" and is_compiled(self.called))

    # Hooks

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._wants(module) or self._current is not None:
            return
        self._recordings = [r for r in self._recordings if not r.used or self.shadows]
        if self.shadows:
            return
        self._current = self._recorder((args, kwargs))
        self._current.__enter__()

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        recorder, self._current = self._current, None
        if recorder is not None:
            recorder.__exit__(None, None, None)
        if result is None or not self._wants(module) or (recorder is None and not self.shadows):
            return  # the forward pass raised, or is not wanted
        try:
            z = resolve_output(result, self.output)
        except TypeError:
            if self.output is not None:
                raise
            z = None  # the loss tap will see the tensor
        recording = Recording(recorder or self._recorder(None), (args, kwargs), z)
        self._recordings.append(recording)
        if z is not None and z.requires_grad and self.mode != "loss":
            z.register_hook(_OutputHook(self, recording))

    def _after_loss(self, module: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if not self._recordings or self._busy or not self.armed or self.mode == "gradient":
            return
        if not torch.is_grad_enabled():
            return
        arguments = [*args, *kwargs.values()]
        z = arguments[0] if args else kwargs.get("input", arguments[0] if arguments else None)
        if not isinstance(z, Tensor) or not z.requires_grad:
            return
        if self.shadows:
            for recording in self._recordings:
                if recording.output is z:
                    recording.seen = (args, kwargs)
            return
        if self.loss is None:
            self._wait_for_backward(z, loss)
            return
        rest = [a for a in arguments if a is not z]
        terms = self.loss.terms(z, *rest, as_called=True)
        self._collect(self._recordings, z, terms)

    def _wait_for_backward(self, z: Tensor, loss: Any) -> None:
        """Empirical statistics of a loss nobody interprets: from the gradient the user's backward brings."""
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            raise ValueError(
                "an empirical Fisher of a loss of unknown type needs the loss as one number: use reduction='mean' or "
                f"'sum', not a result of shape {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)}."
            )
        scale: list[Tensor] = []
        recordings = list(self._recordings)
        for recording in recordings:
            recording.used = True
        reduction = getattr(self.loss_module, "reduction", "mean")

        def on_output(gradient: Tensor) -> None:
            if self._busy or not self.armed:
                return
            terms = from_output_gradient(None, z, gradient, scale[0] if scale else None, reduction, self.class_dim)
            self._collect(recordings, z, terms)

        loss.register_hook(lambda gradient: scale.append(gradient.detach()))
        z.register_hook(on_output)

    def _output_gradient(self, recording: Recording, gradient: Tensor) -> None:
        """The gradient tap."""
        if self._busy or not self.armed or recording.used:
            return
        if self.shadows:
            recording.output_gradient = gradient.detach()
            return
        assert recording.output is not None
        terms = from_output_gradient(self.loss, recording.output, gradient, None, "mean", self.class_dim)
        self._collect([recording], recording.output, terms)

    # Statistics

    def _collect(self, recordings: list[Recording], z: Tensor, terms: Terms) -> None:
        merged = recordings[0].recorder if len(recordings) == 1 else _merged([r.recorder for r in recordings])
        counted = recordings[0].counted
        first = recordings[0].total is None
        for recording in recordings:
            recording.used = True
            recording.total = terms.total if recording.total is None else recording.total
            recording.counted = counted  # uses that several losses share count their inputs once
        signals = Signals(
            terms, self.curvature.kind, self.curvature.samples, self.generator, merged.batch, together=True
        )
        scale = None if first else (recordings[0].total / terms.total).sqrt()  # type: ignore[operator]
        self._busy = True
        try:
            with torch.enable_grad():
                reached = self.collector.collect(merged, z, signals, counted=counted, scale=scale)
        finally:
            self._busy = False
        if reached:
            self.batches += 1
            self.reached |= reached

    def finish(self) -> None:
        """Run what can only be done after the backward pass: the shadow passes."""
        if not self.shadows:
            return
        for recording in self._recordings:
            self.shadow(recording)
        self._recordings = []

    def shadow(self, recording: Recording) -> None:
        """Repeat a forward pass on its stored inputs, eagerly, and collect from that."""
        args, kwargs = recording.inputs
        with untouched(self.model), plain_checkpoints():
            recorder = self._recorder((args, kwargs))
            forward = self.model.forward  # neither hooks nor a compiled call
            with torch.enable_grad(), recorder:
                result = forward(*args, **kwargs)
            z = resolve_output(result, self.output)
            if recording.seen is not None and self.loss is not None:
                positional, named = recording.seen
                rest = [a for a in [*positional, *named.values()] if a is not recording.output]
                terms = self.loss.terms(z, *rest, as_called=True)
            elif recording.output_gradient is not None:
                terms = from_output_gradient(self.loss, z, recording.output_gradient, None, "mean", self.class_dim)
            else:
                return
            self._collect([Recording(recorder, recording.inputs, z)], z, terms)

    def _wants(self, module: nn.Module) -> bool:
        if not self.armed or self._busy or not torch.is_grad_enabled():
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


class _Hook:
    """A hook that does not keep its owner alive, and that copies and pickles of the model leave behind."""

    def __init__(self, owner: Capture, method: str) -> None:
        self._owner = weakref.ref(owner)
        self._method = method

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # traced away: a compiled graph cannot be watched from inside
        owner = self._owner()
        if owner is not None:
            getattr(owner, self._method)(*args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return inert, ()


class _OutputHook:
    """The gradient tap of one recorded pass."""

    def __init__(self, owner: Capture, recording: Recording) -> None:
        self._owner = weakref.ref(owner)
        self._recording = recording

    def __call__(self, gradient: Tensor) -> None:
        owner = self._owner()
        if owner is not None:
            owner._output_gradient(self._recording, gradient)


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a copied hook does."""


def inert() -> Callable[..., None]:
    """What a pickled hook is rebuilt as."""
    return nothing


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Whether calls of the model run compiled code."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _interpreted(loss_fn: Any, curvature: Curvature) -> Loss | None:
    """The loss as an object; an empirical Fisher does without."""
    try:
        return loss_for(loss_fn)
    except UnknownLossError:
        if curvature.kind == "empirical":
            return None
        raise


def _merged(recorders: list[Recorder]) -> Recorder:
    """Several forward passes that led to one loss, as one."""
    first = recorders[0]
    out = Recorder({}, (), first.batch)
    for recorder in recorders:
        out.sites += recorder.sites
        out.examples_interact |= recorder.examples_interact
        for name, operations in recorder.unknown.items():
            out.unknown.setdefault(name, set()).update(operations)
    return out


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints run as plain calls inside, so that what they hide is recorded."""
    original = checkpoint.CheckpointFunction.apply

    def call(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    checkpoint.CheckpointFunction.apply = staticmethod(call)
    try:
        yield
    finally:
        checkpoint.CheckpointFunction.apply = original
