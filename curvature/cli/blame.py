"""Which call of the user's model or loss an error came from."""

from __future__ import annotations

import dis
from collections.abc import Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any

from torch import Tensor, nn

import solvers

_OURS = tuple(Path(solvers.__file__).parent.parent / name for name in ("solvers", "curvature", "precond"))
_RAISE = dis.opmap["RAISE_VARARGS"]


def called_on(error: BaseException) -> str:
    """What to say before an error that a call of the user's model or loss raised; empty for errors of this library.

    Args:
        error: The error, with its traceback.
    """
    found = ""
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if not found and frame.f_code.co_name == "_call_impl" and isinstance(module, nn.Module):
            given = (*frame.f_locals.get("args", ()), *frame.f_locals.get("kwargs", {}).values())
            found = f"in {type(module).__name__}({', '.join(map(described, given))}): "
    return "" if _raised_here(error) else found


def _raised_here(error: BaseException) -> bool:
    """Whether a statement of this library raised it, and not what it called."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is None or not any(Path(tb.tb_frame.f_code.co_filename).is_relative_to(folder) for folder in _OURS):
        return False
    return tb.tb_frame.f_code.co_code[tb.tb_lasti] == _RAISE


def described(value: Any) -> str:
    """A value in a few words: its type, and what is in it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"mapping with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (list, tuple)) and value:
        return f"{type(value).__name__} of {len(value)} {type(value[0]).__name__}"
    return type(value).__name__
