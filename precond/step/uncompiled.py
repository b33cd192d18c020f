"""Steps that ``torch.compile`` leaves as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that a compiler which traces its caller calls as it is, after a graph break.

    Work that is due now and then, factorizations that may fail and running averages give a graph nothing to fuse.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside_of_the_graph(method, args, kwargs)
        return method(*args, **kwargs)

    return call


# Torch's own optimizers use it too: torch.compiler.disable would import the compiler together with this module.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside_of_the_graph(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return method(*args, **kwargs)
