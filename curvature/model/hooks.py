"""Hooks that keep their owner collectable and stay behind when a model is copied."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch


class OwnHook:
    """What the library hangs on backward passes."""


def stands_for_several(gradient: Any) -> bool:
    """Whether a gradient is that of a vectorised pass (``is_grads_batched=True``, ``vmap``): it writes no ``p.grad``.

    It has no values of its own that could be looked at.
    """
    return isinstance(gradient, torch.Tensor) and "Batched" in str(torch._C._dispatch_keys(gradient))


class At(OwnHook):
    """Calls a method of its owner with something it is about, and keeps neither alive.

    Vectorised passes are none that the owner waits for.
    """

    def __init__(self, owner: Any, method: str, about: Any) -> None:
        self._owner, self._method = weakref.ref(owner), method
        self._about: Callable[[], Any] = weakref.ref(about) if hasattr(about, "__weakref__") else lambda: about

    def __call__(self, *args: Any) -> None:
        owner, about = self._owner(), self._about()
        if owner is None or about is None:
            return
        if not any(map(stands_for_several, args[0] if args and isinstance(args[0], tuple) else args)):
            getattr(owner, self._method)(about, *args)


class Hook:
    """A hook that does not keep its owner alive, and that copies and pickles of the model leave behind."""

    def __init__(self, owner: Any, method: str) -> None:
        self._owner = weakref.ref(owner)
        self._method = method

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            _outside_of_the_graph(self, *args)
        else:
            self.run(*args)

    def run(self, *args: Any, compiled: bool = False) -> None:
        """Run the hook."""
        owner = self._owner()
        if owner is not None:
            owner.compiled |= compiled
            getattr(owner, self._method)(*args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return inert, ()


class EagerHook(Hook):
    """A hook that compiled code leaves out, and that neither sees nor disturbs what watches function calls."""

    def __call__(self, *args: Any) -> None:
        owner = None if torch.compiler.is_compiling() else self._owner()
        if owner is not None:
            with torch._C.DisableTorchFunction():
                getattr(owner, self._method)(*args)


# As torch's own optimizers do: torch.compiler.disable would import the compiler together with this module.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside_of_the_graph(hook: Hook, *args: Any) -> None:
    """Run a hook that is being compiled together with its module: a graph break keeps it."""
    hook.run(*args, compiled=True)


def calling_frame() -> FrameType:
    """The frame of the module call that runs the current hook."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and (
        frame.f_globals.get("__name__", "").startswith("curvature.") or frame.f_code.co_name == "inner"
    ):
        frame = frame.f_back
    assert frame is not None
    return frame


def remove(handles: list[Any]) -> None:
    """Remove hooks, and forget their handles, in place."""
    while handles:
        handles.pop().remove()


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: in the place of a hook that was copied, or of what follows a backward pass."""


def inert() -> Callable[..., None]:
    """A hook as it is rebuilt from a pickle."""
    return nothing
