"""Random numbers of passes of our own, beside the stream of the process that other threads draw from."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.model.wrappers import is_compiled

#: Packages and modules whose threads draw no numbers: of notebooks, debuggers, progress bars, loaders, test runners.
_QUIET = (
    *("IPython", "_pydevd_bundle", "debugpy", "execnet", "ipykernel", "tensorboard", "tornado", "tqdm", "zmq"),
    *("multiprocessing.queues", "torch._inductor", "torch.utils.data"),
)


class _Own(threading.local):
    """The stream that this thread draws from; ``None`` for that of the process."""

    stream: _Stream | None = None


_own = _Own()
_making = threading.Lock()


@contextlib.contextmanager
def own_stream(model: nn.Module, device: torch.device, states: list[Tensor] | None = None) -> Iterator[None]:
    """Draw random numbers inside from a stream of one's own; the stream of the process stays where it is.

    Torch has one generator for the CPU and one for each accelerator. Alone in its process, a pass borrows them and puts
    them back. Beside other threads it draws the same numbers from a generator of its own, which it hands to every
    operation that takes one; there, draws on an accelerator and inside compiled code still borrow.

    Args:
        model: The model that will run.
        device: Where it runs.
        states: Where the stream begins, as :func:`random_state` gives it; where this thread's stream is, by default.
    """
    states = random_state(device) if states is None else states
    borrows = _own.stream is None and (_alone() or any(is_compiled(module) for module in model.modules()))
    devices = [device.index or 0] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        if borrows:
            stack.enter_context(torch.random.fork_rng(devices=devices))
        else:
            if device.type == "cuda":
                stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
            stack.enter_context(outside_of_inference())  # which shows a mode less than all
            with _making:
                _make_operations()
            before, _own.stream = _own.stream, _Stream()
            stack.callback(setattr, _own, "stream", before)
            stack.enter_context(_own.stream)
        set_random_state(states, device)
        yield


def random_state(device: torch.device) -> list[Tensor]:
    """States of the generators that a model on ``device`` draws from in this thread."""
    stream = _own.stream
    states = [torch.get_rng_state() if stream is None else stream.generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def drew_since(before: list[Tensor], device: torch.device) -> bool:
    """Whether this thread drew random numbers since ``before = random_state(device)``."""
    return any(not torch.equal(a, b) for a, b in zip(before, random_state(device), strict=True))


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restore :func:`random_state`."""
    stream = _own.stream
    (torch.set_rng_state if stream is None else stream.generator.set_state)(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class _Stream(TorchDispatchMode):
    """Hands a generator to every operation on the CPU that draws; a mode is of one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _device_of(args, kwargs) != "cpu":
            return func(*args, **kwargs)
        drawing = _with_generator(func)
        if drawing is None:
            return func(*args, **kwargs)
        place = [argument.name for argument in drawing._schema.arguments].index("generator")
        by_place = len(args) > place and drawing is func
        if (args[place] if by_place else kwargs.get("generator")) is None:
            _refuse_recomputation()
            if by_place:
                args = (*args[:place], self.generator, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "generator": self.generator}
        return drawing(*args, **kwargs)


@cache
def _make_operations() -> None:
    """Have torch make the objects of all its operations, before modes of several threads ask for them.

    It makes each at its first use, and where two threads do so at once, it may go on with one that nobody keeps, and
    the process dies (torch 2.13). Costs 0.2 s, once.
    """
    for name in torch._C._dispatch_get_all_op_names():
        space, _, operation = name.partition("::")
        packet, _, overload = operation.partition(".")
        if space == "aten":
            getattr(getattr(torch.ops.aten, packet), overload or "default", None)


@cache
def _with_generator(func: Any) -> Any:
    """The operation itself if it takes a generator, else its overload that does, or ``None``."""
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        others = [argument.name for argument in overload._schema.arguments]
        if "generator" in others and sorted(others) == sorted([*names, "generator"]):
            return overload
    return None


def _device_of(args: Any, kwargs: Any) -> str:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    return tensors[0].device.type if tensors else "cpu"


def _refuse_recomputation() -> None:
    """Refuse draws in an activation checkpoint, which is computed again with random numbers of the process."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook"):
        raise RuntimeError(
            "the model draws random numbers (dropout?) inside an activation checkpoint, and other threads of this "
            "process draw, too: computed again, the checkpoint would draw other numbers. Call model.eval(), run this "
            "while no other thread is at work, or switch the checkpoints off."
        )


def _alone() -> bool:
    """Whether no other thread of this process draws random numbers."""
    frames = sys._current_frames()
    return all(ident == threading.get_ident() or _quiet(frame) for ident, frame in frames.items())


def _quiet(frame: FrameType | None) -> bool:
    """Whether a thread runs a helper's code: the outermost frame that is not of ``threading`` says whose it is."""
    outermost = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        outermost = module if module != "threading" else outermost
        frame = frame.f_back
    return f"{outermost}.".startswith(tuple(f"{name}." for name in _QUIET))


@contextlib.contextmanager
def outside_of_inference() -> Iterator[None]:
    """Leave inference mode, in which there is no graph; gradients stay enabled or disabled."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield
