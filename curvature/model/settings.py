"""The settings under which a model is evaluated again, to the same numbers, and differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from curvature.model.kernels import differentiable_kernels
from curvature.model.wrappers import as_written


@contextlib.contextmanager
def settings(model: nn.Module, random: list[Tensor], device: torch.device) -> Iterator[None]:
    """The settings under which a model is evaluated for products; restored afterwards, exceptions included.

    Random numbers start from ``random``; buffers are copies, so running statistics stay the same and kept
    graphs refer to constant values; kernels are those that can be differentiated twice, and nothing is compiled.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), own_buffers(model), as_written(model), differentiable_kernels():
        set_random_state(random, device)
        yield


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
