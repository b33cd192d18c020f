"""The precision that numbers are computed in: float32 at least."""

from __future__ import annotations

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
    return torch.promote_types(of if isinstance(of, torch.dtype) else of.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """The tensor in its :func:`working_dtype`; itself if that is its dtype."""
    return x.to(working_dtype(x))
