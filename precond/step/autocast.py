"""Steps inside ``torch.autocast``, whose numbers are none of its business."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from solvers.precision import Autocast, without_autocast


def outside_of_autocast(half: Callable[..., Any]) -> Callable[..., Any]:
    """A step, or half of one, that computes as outside of the regions it is called in, which the closure keeps.

    A region keeps the casts of parameters until its end; those from before the step are dropped.
    """
    inner = without_autocast(half)

    @functools.wraps(half)
    def call(self: Any, closure: Any = None) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return half(self, closure)
        here = Autocast()
        try:
            return inner(self, here.around(closure) if callable(closure) else closure)
        finally:
            torch.clear_autocast_cache()

    return call
