"""Memory that runs out, told from errors that say something else.

A slower way, a second attempt or another explanation helps against an operation that is not implemented, not against
a full memory: whoever catches errors of torch asks here first, and lets those of memory through.
"""

from __future__ import annotations

import torch

#: How torch's allocators and libraries say it in a plain ``RuntimeError``: CPU, CUDA and MPS, cuBLAS and cuSOLVER.
_WORDS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory", "_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, says that memory ran out.

    Args:
        error: What was caught.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in _WORDS):
            return True
        cause = cause.__cause__
    return False
