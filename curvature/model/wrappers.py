"""Wrappers around a model or inside it: compilers, data parallelism, checkpoints."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of trainers (Accelerate, Lightning), which keep it as ``optimizer``."""
    while hasattr(inner := getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = inner
    return optimizer


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel around or on the way to the user's module, or whose forward pass runs just now."""
    wrapper: Any = model
    while wrapper is not None:
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            return wrapper
        wrapper = getattr(wrapper, "_orig_mod", None)
    if not torch.distributed.is_available():
        return None
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


@contextlib.contextmanager
def undisturbed(parallel: nn.parallel.DistributedDataParallel | None) -> Iterator[None]:
    """For backward passes that write no gradients: DDP takes none of them for its first, after which it averages.

    With ``static_graph=True`` a node behind the output starts the first reduction at the end of whichever backward pass
    reaches it first.
    """
    started = None if parallel is None else getattr(parallel, "_static_graph_delay_allreduce_enqueued", None)
    if started is not False:
        yield
        return
    assert parallel is not None
    parallel._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        parallel._static_graph_delay_allreduce_enqueued = False


def passed_on(output: Any, z: Any) -> Any:
    """What DDP has made of an output on its way to the loss, which sees ``z``: the output itself, or a copy of it."""
    if not isinstance(z, Tensor) or not isinstance(output, Tensor):
        return output
    base = z if z._base is None else z._base
    node = base.grad_fn
    if node is None or node.name() != "_DDPSinkBackward":
        return output
    return base if (output.grad_fn, output.output_nr) in node.next_functions else output


def is_compiled(model: nn.Module) -> bool:
    """Whether calls of the model run compiled code."""
    call = getattr(model, "_compiled_call_impl", None)
    return hasattr(model, "_orig_mod") or not (call is None or isinstance(call, CallGuard))


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Within the block compiled parts of a model run as they are written.

    Compiled code has no second derivative, and what watches its calls would be compiled with it.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        if is_compiled(module):
            own = vars(module)
            name = "forward" if hasattr(module, "_orig_mod") else "_compiled_call_impl"
            before.append((own, name, own[name]))
    try:
        for own, name, _ in before:
            own[name] = own["_modules"]["_orig_mod"].__call__ if name == "forward" else None
        yield
    finally:
        for own, name, value in before:
            own[name] = value


class Depth(threading.local):
    """How deep each thread is in something that may hold itself: a call of a module, or passes of our own."""

    value = 0

    @contextlib.contextmanager
    def deeper(self) -> Iterator[None]:
        """One level more inside."""
        self.value += 1
        try:
            yield
        finally:
            self.value -= 1


class CallGuard:
    """Runs a function whenever the outermost call of a module ends, whichever way.

    Hooks do not see a keyboard interrupt. It stands where ``module.compile()`` puts compiled code, which copies and
    pickles of a module leave behind.

    Args:
        module: The module.
        after: The function; it gets the result, ``None`` if the call raised.
    """

    def __init__(self, module: nn.Module, after: Callable[[Any], None]) -> None:
        self._module, self._after = weakref.ref(module), after
        self._here = Depth()
        self._inner: CallGuard | None = module.__dict__.get("_compiled_call_impl") if not is_compiled(module) else None
        if not is_compiled(module):
            module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None
        self._here.value += 1
        result = None
        try:
            result = (self._inner or module._call_impl)(*args, **kwargs)
        finally:
            self._here.value -= 1
            if not self._here.value:
                self._after(result)
        return result

    def remove(self) -> None:
        """Let the module be called as before."""
        self._after = lambda result: None  # another guard may still call this one
        module = self._module()
        if module is not None and module.__dict__.get("_compiled_call_impl") is self:
            del module._compiled_call_impl
            if self._inner is not None:
                module._compiled_call_impl = self._inner


_plain_here = Depth()  # in plain_checkpoints
_not_reentrant = checkpoint._checkpoint_without_reentrant_generator
_plain_lock = threading.Lock()
_plain_users: list[int] = []  # threads in plain_checkpoints, while torch's function is replaced


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Checkpoints inside, in this thread, show what they contain, to as many backward passes as come.

    Reentrant ones run as plain calls, so that their contents are recorded; selective ones, which allow for one backward
    pass only, compute all again.
    """
    with _plain_lock:
        if not _plain_users:
            setattr(checkpoint.CheckpointFunction, "apply", staticmethod(_plain_call))  # noqa: B010
            setattr(checkpoint, "_checkpoint_without_reentrant_generator", _not_selective)  # noqa: B010
        _plain_users.append(threading.get_ident())
    try:
        with _plain_here.deeper():
            yield
    finally:
        with _plain_lock:
            _plain_users.pop()
            if not _plain_users:
                delattr(checkpoint.CheckpointFunction, "apply")  # the inherited one is visible again
                setattr(checkpoint, "_checkpoint_without_reentrant_generator", _not_reentrant)  # noqa: B010


def _plain_call(function: Any, preserve: bool, *args: Any) -> Any:
    if _plain_here.value:
        return function(*args)
    return super(checkpoint.CheckpointFunction, checkpoint.CheckpointFunction).apply(function, preserve, *args)


def _not_selective(function: Any, preserve: bool = True, context_fn: Any = None, *args: Any, **kwargs: Any) -> Any:
    """What runs before and after the call of a checkpoint that is not reentrant."""
    contexts = context_fn() if _plain_here.value else None
    if contexts is not None and isinstance(contexts[0], checkpoint._CachingTorchDispatchMode):
        context_fn = checkpoint.noop_context_fn
    elif contexts is not None:
        context_fn = lambda: contexts  # noqa: E731  # it was asked for them already
    return _not_reentrant(function, preserve, context_fn, *args, **kwargs)


def in_selective_checkpoint() -> bool:
    """Whether what runs now, in this thread, is part of a checkpoint that allows for one backward pass only."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(m, checkpoint._CachingTorchDispatchMode) for m in _get_current_dispatch_mode_stack())
