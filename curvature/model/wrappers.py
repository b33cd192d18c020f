"""Wrappers around a model or inside it: compilers, data parallelism, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils import checkpoint


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


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints run as plain calls inside, so that their contents are recorded."""

    def call(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    setattr(checkpoint.CheckpointFunction, "apply", staticmethod(call))  # noqa: B010
    try:
        yield
    finally:
        delattr(checkpoint.CheckpointFunction, "apply")  # the inherited one is visible again
