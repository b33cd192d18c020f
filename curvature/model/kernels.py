"""Kernels that can be differentiated twice, in the place of fused ones that cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Use kernels that have a second derivative.

    Fused attention, cuDNN's recurrence and bags of embeddings lack one, the fast path of encoder layers in eval mode
    lacks derivatives altogether, and that of the fused weight norm is wrong.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH), _PlainKernels():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class _PlainKernels(TorchFunctionMode):
    """Runs some functions in another way, to the same result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PLAIN:
            return _PLAIN[func](func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(attend: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Attention by its mathematics, also inside a context of the model's own that asks for a fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return attend(*args, **kwargs)


def _recurrence(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A recurrence of plain operations."""
    with torch.backends.cudnn.flags(enabled=False):
        return run(*args, **kwargs)


def _weight_norm(fused: Callable[..., Tensor], v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """A weight norm from its parts.

    The backward pass of the fused kernel takes the norms as constants, so its derivative lacks their part (the Hessian
    is not even symmetric).
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding_bag(
    fused: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of embeddings from the embeddings of their members."""
    if scale_grad_by_freq or not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        options = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return fused(input, weight, offsets, *options, padding_idx)
    if offsets is None:  # (bags, members)
        bags = len(input)
        bag = torch.arange(bags, device=input.device).repeat_interleave(input[0].numel() if bags else 0)
        index = input.reshape(-1)
    else:
        index, starts = input, offsets[:-1] if include_last_offset else offsets
        bags = len(starts)
        place = torch.arange(len(index), device=index.device)
        bag = torch.searchsorted(starts.contiguous(), place.to(starts.dtype), right=True) - 1
    rows = F.embedding(index, weight, None, max_norm, norm_type)
    valid = torch.ones_like(bag, dtype=torch.bool)
    if padding_idx is not None:
        valid = index != padding_idx % len(weight)
        index, bag, rows = index[valid], bag[valid], rows[valid]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[valid].unsqueeze(-1)
    if mode == "max":
        spread = bag.unsqueeze(-1).expand_as(rows)
        with torch.no_grad():
            top = rows.new_full((bags, rows.shape[-1]), -torch.inf).scatter_reduce(0, spread, rows, "amax")
            # The first of equal members is the largest, as in the kernel.
            place = torch.arange(len(rows), device=rows.device).unsqueeze(-1).expand_as(rows)
            place = place.masked_fill(rows != top[bag], len(rows))
            first = place.new_full(top.shape, len(rows)).scatter_reduce(0, spread, place, "amin")
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])  # empty bags are zero
        return padded.gather(0, first)
    total = rows.new_zeros(bags, rows.shape[-1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    count = torch.zeros(bags, dtype=rows.dtype, device=rows.device).index_add(0, bag, torch.ones_like(rows[:, 0]))
    return total / count.clamp(min=1).unsqueeze(-1)


#: Functions -> what runs in their place, called with the function itself and its arguments.
_PLAIN: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    torch._weight_norm: _weight_norm,
    F.embedding_bag: _embedding_bag,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrence),
}
