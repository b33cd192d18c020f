"""The precision that numbers are computed in: float32 at least."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class HasDtype(Protocol):
    """Anything with a dtype: a tensor, an operator, a set of parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its numbers."""


def working_dtype(of: HasDtype | torch.dtype) -> torch.dtype:
    """The dtype where it has at least float32's precision, else float32 (complex64 for complex numbers)."""
    return _at_least_float32(of if isinstance(of, torch.dtype) else of.dtype)


@cache
def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # an operation of torch, at its price


def widen(x: Tensor) -> Tensor:
    """The tensor in its :func:`working_dtype`; itself if that is its dtype."""
    dtype = working_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)
