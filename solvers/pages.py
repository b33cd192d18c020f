"""Memory for large results in huge pages, where the system has them.

A large tensor lies in memory that the process has not touched: the system hands it out page by page, at the first
write to each. For pages of 4 KiB that takes several times as long as the writing.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from math import prod

import torch
from torch import Tensor

#: Bytes from which on an allocator of C takes memory anew for each tensor (the largest threshold of glibc); smaller
#: ones are cut out of memory that was in use before.
LARGE = 1 << 25


def fresh(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, whose memory is to come in huge pages if it is large and on the processor.

    Linux gives them where they are switched on for those who ask (``/sys/kernel/mm/transparent_hugepage/enabled`` is
    ``madvise``, or ``always``). Nothing else changes: where there are none, pages are small.

    Args:
        shape: Sizes of the tensor.
        dtype: Type of its numbers.
        device: Where it lies.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.device.type == "cpu" and out.nbytes >= LARGE and (advise := _madvise()) is not None:
        size = mmap.PAGESIZE
        start = -(-out.data_ptr() // size) * size  # whole pages of its own
        advise(start, (out.data_ptr() + out.nbytes) // size * size - start, mmap.MADV_HUGEPAGE)
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for tensors of two axes at least, whose result lies in :func:`fresh` memory if it is large.

    To the bit what ``@`` gives; operands that are differentiated are left to it.
    """
    shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
    graph = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if graph or left.dtype != right.dtype or left.device.type != "cpu" or prod(shape) * left.element_size() < LARGE:
        return left @ right
    return torch.matmul(left, right, out=fresh(*shape, dtype=left.dtype, device=left.device))


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The function of the C library; ``None`` where the system knows no huge pages that one may ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found  # its answer is that of a wish: an error changes nothing
