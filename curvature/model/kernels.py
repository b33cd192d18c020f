"""Kernels that can be differentiated twice, in the place of fused ones that cannot."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def differentiable_kernels() -> contextlib.AbstractContextManager[Any]:
    """Use kernels that have a second derivative, in this thread.

    Fused attention, cuDNN's recurrence and bags of embeddings lack one, and that of the fused weight norm is wrong. The
    fast path of encoder layers in eval mode lacks derivatives altogether; under a function mode torch does not take it.
    """
    return _PlainKernels()


class _PlainKernels(TorchFunctionMode):
    """Runs some functions in another way, to the same result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PLAIN:
            return _PLAIN[func](func, *args, **(kwargs or {}))
        if func in _SEEN_INSIDE:
            with self:
                return _SEEN_INSIDE[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _without_dispatch(original: Any) -> Any:
    """A function with its own look for function modes switched off.

    The original hands itself to the active mode before it runs, and a mode is off while it handles a call, so what is
    inside would never be seen. The copy shares the code object: values are bit-identical.
    """
    blind = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda *_: False)
    scope = {**original.__globals__, **blind}
    copy = types.FunctionType(original.__code__, scope, original.__name__, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


ATTENTION = _without_dispatch(F.multi_head_attention_forward)
#: Functions in which others run that are to be seen: attention, and what is computed again in a backward pass.
_SEEN_INSIDE: dict[Any, Any] = {
    F.multi_head_attention_forward: ATTENTION,
    torch.autograd.grad: _without_dispatch(torch.autograd.grad),
    Tensor.backward: _without_dispatch(Tensor.backward),
}


def _attention(
    fused: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Attention by torch's own reference kernel, which adds its mask."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    result: Tensor = torch._scaled_dot_product_attention_math(query, key, value, attn_mask, *args, **kwargs)[0]
    return result


def _recurrence(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A recurrence of plain operations."""
    with _without_cudnn() if torch.backends.cudnn.is_available() else contextlib.nullcontext():
        return run(*args, **kwargs)


class _Cudnn:
    """How many threads have switched cuDNN off, and how it was before the first one."""

    lock = threading.Lock()
    users = 0
    enabled = True


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Switch cuDNN off; for the whole process, torch having no other switch."""
    with _Cudnn.lock:
        if not _Cudnn.users:
            _Cudnn.enabled = torch.backends.cudnn.enabled
            torch.backends.cudnn.enabled = False
        _Cudnn.users += 1
    try:
        yield
    finally:
        with _Cudnn.lock:
            _Cudnn.users -= 1
            if not _Cudnn.users:
                torch.backends.cudnn.enabled = _Cudnn.enabled


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
