"""The settings under which a model is evaluated again, to the same numbers, and differentiated twice."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvature.model.data import inspection
from curvature.model.kernels import differentiable_kernels
from curvature.model.streams import own_stream
from curvature.model.wrappers import as_written


@contextlib.contextmanager
def settings(model: nn.Module, random: list[Tensor], device: torch.device) -> Iterator[None]:
    """:func:`untouched`, with random numbers from ``random`` on and kernels that can be differentiated twice."""
    with untouched(model, device, random), differentiable_kernels():
        yield


@contextlib.contextmanager
def untouched(
    model: nn.Module, device: torch.device | None = None, random: list[Tensor] | None = None
) -> Iterator[None]:
    """Passes inside are the library's own, and leave the model as it is; restored afterwards, exceptions included.

    Buffers are copies, so running statistics stay the same, and graphs that hold one, the user's or one that is kept,
    refer to constant values. Attributes that a pass sets are put back. Random numbers come from a stream beside that of
    the process; nothing is compiled.

    Args:
        model: The model that will run.
        device: Where it runs; where its parameters are, by default.
        random: Where the random numbers begin; where the stream of the process is, by default.
    """
    if device is None:
        device = next((p.device for p in model.parameters() if p.device.type == "cuda"), torch.device("cpu"))
    with inspection(), own_stream(model, device, random), own_buffers(model), as_written(model):
        yield


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers, and leave the attributes of its modules as they were.

    A model that makes or grows a buffer remembers so in an attribute, which has to agree with the buffer afterwards.
    """
    before = [(module, dict(vars(module)), dict(module._buffers.items())) for module in model.modules()]
    originals = {id(b): b for *_, buffers in before for b in buffers.values() if b is not None}
    copies = copied(originals)
    written = {key: (writes(b), writes(copies[key])) for key, b in originals.items()}
    try:
        for module, _, buffers in before:
            for name, b in buffers.items():
                if b is not None:
                    module._buffers[name] = copies[id(b)]
        yield
    finally:
        for module, attributes, buffers in before:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            for name, value in attributes.items():
                if now.get(name, now) is not value:
                    now[name] = value
            # The pass made or dropped one; the buffers of torch.jit cannot be cleared.
            if list(module._buffers.keys()) != list(buffers):
                module._buffers.clear()
            for name, b in buffers.items():
                module._buffers[name] = b
        with torch.no_grad():
            for key, b in originals.items():
                original, own = written[key]
                # The model wrote to it by another name; the copy has the value from before, unless written as well.
                if writes(b) != original and writes(copies[key]) == own:
                    b.copy_(copies[key])


def copied(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    """Copies of tensors, of which those that share memory share it again."""
    homes = {
        key: t.untyped_storage()._cdata if type(t) is Tensor and t.layout is torch.strided else key
        for key, t in tensors.items()
    }
    count = Counter(homes.values())
    together = {key: t.detach() for key, t in tensors.items() if count[homes[key]] > 1}
    alone = {key: t.detach().clone() for key, t in tensors.items() if key not in together}
    return alone | copy.deepcopy(together)


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which operations on a device are cast now; ``None`` without autocast."""
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else None


def autocasting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Cast operations on a device to a dtype, or none of them, whatever is cast now."""
    if dtype == autocast_dtype(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
