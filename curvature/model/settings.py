"""The settings under which a model is evaluated again, to the same numbers, and differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def settings(model: nn.Module, random: list[Tensor], device: torch.device) -> Iterator[None]:
    """The settings under which a model is evaluated for products; restored afterwards, exceptions included.

    Random numbers start from ``random``; buffers are copies, so running statistics stay the same and kept
    graphs refer to constant values; kernels are those that can be differentiated twice.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), own_buffers(model), differentiable_kernels(model):
        set_random_state(random, device)
        yield


@contextlib.contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Use kernels that have a second derivative.

    Fused attention and cuDNN's recurrence lack one, the fast path of encoder layers in eval mode lacks derivatives
    altogether, and that of the fused weight norm is wrong.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm(), cudnn:
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    for module, buffers in before:
        for name, b in buffers.items():
            if b is not None:
                module._buffers[name] = copies.setdefault(id(b), b.detach().clone())
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


def versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Versions of the parameters, frozen ones included, which tell whether one was written since."""
    return {name: (p._version, p.data_ptr()) for name, p in model.named_parameters()}


def refuse_changes(model: nn.Module, before: dict[str, tuple[int, int]]) -> None:
    """Raise if a parameter was written since ``before = versions(model)``."""
    now = versions(model)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise RuntimeError(
            f"{changed[0]} was changed after this operator was made (by an optimizer step?), so products before and "
            "after would belong to different matrices. Make the operator anew."
        )


def random_state(device: torch.device) -> list[Tensor]:
    """States of torch's default generators that a model on ``device`` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restore :func:`random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class _PlainWeightNorm(TorchFunctionMode):
    """Computes a weight norm from its parts.

    The backward pass of the fused kernel takes the norms as constants, so its derivative lacks their part (the Hessian
    is not even symmetric).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
