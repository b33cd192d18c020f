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


@cache
def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Whether a device has units for products of bfloat16 matrices, several times as fast as those of float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.10 on
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
