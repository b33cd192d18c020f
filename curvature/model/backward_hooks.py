"""Hooks on backward passes belong to the user's own passes: ours run without them, and leave them where they are.

A hook may count, log, or change a gradient. Curvature is that of the functions, not of what a hook makes of their
gradients; and what a training loop sees must not depend on who differentiates its graph once more.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from curvature.model.fully_sharded import notices_passes
from curvature.model.graph_nodes import below
from curvature.model.hooks import OwnHook, nothing
from curvature.model.trees import tensors_in

#: Functions by which something is hung on the graph of a tensor.
HANGING = frozenset({Tensor.register_hook, Tensor.retain_grad})
Hooks = MutableMapping[int, Any]


class _Registered(threading.local):
    """Hooks of the library's own that this thread has registered."""

    number = 0


_registered = _Registered()


def ours(handle: Any) -> Any:
    """Count a hook of our own, whose handle this is, so that it is not taken for one of the user's."""
    _registered.number += 1
    return handle


def others() -> int:
    """A number that grows with every hook that somebody else registers."""
    return RemovableHandle.next_id - _registered.number


class GraphHooks:
    """The hooks on the graph of one forward pass, from its beginning on."""

    def __init__(self) -> None:
        self._walked = others()
        self._hung: dict[int, Hooks] = {}
        self._tensors: list[weakref.ref[Tensor]] = []

    def note(self, tensor: Tensor) -> None:
        """A tensor on which hooks may have been hung, or may yet be."""
        if tensor.requires_grad:
            self._tensors.append(weakref.ref(tensor))
            self._keep(tensor._backward_hooks)

    def _keep(self, hooks: Hooks | None) -> None:
        # Autograd keeps the hooks of a tensor that is gone, where nobody finds them any more.
        if hooks:
            self._hung[id(hooks)] = hooks

    def look(self, outputs: Iterable[Tensor]) -> bool:
        """Find the hooks on the graph that leads to some outputs; whether there are others than ours."""
        outputs = list(outputs)
        for tensor in outputs:
            self.note(tensor)
        for ref in self._tensors:
            if (noted := ref()) is not None:
                self._keep(noted._backward_hooks)
        now = others()
        if now != self._walked:
            self._walked = now
            for hooks in on_nodes(outputs):
                self._keep(hooks)
        hung = (hook for hooks in self._hung.values() for hook in hooks.values())
        return any(not isinstance(hook, OwnHook) and not notices_passes(hook) for hook in hung)

    @contextlib.contextmanager
    def muted(self, outputs: Iterable[Tensor]) -> Iterator[None]:
        """No hook on the graph that leads to the outputs runs inside, and no gradient is kept for ``retain_grad``."""
        self.look(outputs)
        retaining = [t for ref in self._tensors if (t := ref()) is not None and t.retains_grad and not t.is_leaf]
        gradients = [(t, t.grad) for t in retaining]
        try:
            with muted(self._hung.values()):
                yield
        finally:
            for tensor, gradient in gradients:
                tensor.grad = gradient


@contextlib.contextmanager
def muted(hung: Iterable[Hooks | None]) -> Iterator[None]:
    """Inside, the hooks in some dictionaries are not run."""
    taken = [(hooks, dict(hooks)) for hooks in hung if hooks]
    for hooks, _ in taken:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, known in taken:
            hooks.update(known)


def of_leaves(tensors: Iterable[Any]) -> Iterator[Hooks | None]:
    """The hooks on those of some tensors that are leaves, parameters for instance."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_leaf:
            yield tensor._backward_hooks


@contextlib.contextmanager
def no_backward_hooks(model: nn.Module) -> Iterator[Callable[[Any], None]]:
    """For forward passes of our own: neither the modules nor their code hang hooks on the graph that is made.

    Yields:
        To be called with the result: takes off what was hung on the nodes of the graph.
    """
    before = others()

    def bare(result: Any) -> None:
        if others() != before:
            for hooks in on_nodes(tensors_in(result)):
                hooks.clear()

    with contextlib.ExitStack() as stack:
        stack.enter_context(muted(h for m in model.modules() for h in (m._backward_hooks, m._backward_pre_hooks)))
        if torch.is_grad_enabled():
            stack.enter_context(_HangNothing())
        yield bare


class _HangNothing(TorchFunctionMode):
    """Hooks are not registered inside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HANGING:
            return ours(RemovableHandle(OrderedDict())) if func is Tensor.register_hook else None
        return func(*args, **(kwargs or {}))


def on_nodes(outputs: Iterable[Tensor]) -> Iterator[Hooks]:
    """The hooks on the nodes of a graph, but for those of leaves, which run where gradients are written."""
    for node in below(outputs):
        if not hasattr(node, "variable"):
            for register in (node.register_hook, node.register_prehook):
                handle = ours(register(nothing))
                hooks = handle.hooks_dict_ref()
                handle.remove()
                if hooks:
                    yield hooks
