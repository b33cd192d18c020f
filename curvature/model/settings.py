"""The settings under which a model is evaluated again, to the same numbers, and differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvature.model.data import inspection
from curvature.model.inner_backward import passes_of
from curvature.model.kernels import differentiable_kernels
from curvature.model.moment import Moment, copied, writes
from curvature.model.streams import outside_of_inference, own_stream
from curvature.model.synchronized import refuse_synchronized
from curvature.model.wrappers import as_written


@contextlib.contextmanager
def settings(model: nn.Module, random: list[Tensor], device: torch.device, at: Moment | None = None) -> Iterator[None]:
    """:func:`untouched`, with random numbers from ``random`` on and kernels that can be differentiated twice."""
    with untouched(model, device, random, at), differentiable_kernels():
        yield


@contextlib.contextmanager
def untouched(
    model: nn.Module,
    device: torch.device | None = None,
    random: list[Tensor] | None = None,
    at: Moment | None = None,
    *,
    together: bool = False,
) -> Iterator[None]:
    """Passes inside are the library's own, and leave the model as it is; restored afterwards, exceptions included.

    Buffers are copies, so running statistics stay the same, and graphs that hold one, the user's or one that is kept,
    refer to constant values. Attributes that a pass sets are put back. Random numbers come from a stream beside that of
    the process; nothing is compiled.

    Args:
        model: The model that will run.
        device: Where it runs; where its parameters are, by default.
        random: Where the random numbers begin; where the stream of the process is, by default.
        at: The model is as it was then: in modes, attributes and buffers.
        together: Whether all processes of a run do the same pass, so that its layers may send messages.

    Raises:
        NotImplementedError: If a layer sends messages to other processes, which do not expect them.
    """
    if not together:
        refuse_synchronized(model)
    if device is None:
        device = next((p.device for p in model.parameters() if p.device.type == "cuda"), torch.device("cpu"))
    with (
        outside_of_inference(),
        inspection(),
        passes_of(model.parameters()),
        own_stream(model, device, random),
        own_buffers(model, at),
        as_written(model),
    ):
        yield


#: Bytes of the largest buffer of which a pass of ours keeps a second copy, for one that is written by two names.
_SECOND = 1 << 20


def _is_small(buffer: Tensor) -> bool:
    return buffer.numel() * buffer.element_size() <= _SECOND  # a sparse one has no bytes of its own


@contextlib.contextmanager
def own_buffers(model: nn.Module, at: Moment | None = None) -> Iterator[None]:
    """Let the model work on copies of its buffers, and leave what its modules remember as it was.

    A model that makes or grows a buffer remembers so in an attribute, which has to agree with the buffer afterwards.

    Args:
        model: The model.
        at: Inside, attributes, modes, generators and values of buffers are those of then.

    Raises:
        RuntimeError: If a buffer of then is gone, or a large one was written by its name and by another.
    """
    now = Moment(model, at, only=None if at is None else {id(b) for b in model.buffers() if _is_small(b)})
    own = now.values if at is None else at.had()
    of_now = {key for key in own if at is None or at.versions[key] == now.versions.get(key)}
    begun = {key: writes(b) for key, b in own.items()}
    second = copied({k: b for k, b in now.buffers.items() if k in own and _is_small(b)}) if at is None else now.values
    try:
        (now if at is None else at).restore(own)
        yield
    finally:
        now.restore()
        with torch.no_grad():
            for key in now.written():
                # The model wrote to it by another name. Its own copy has the value from before, unless written as well.
                b = now.buffers[key]
                value = second.get(key, own[key] if key in of_now and writes(own[key]) == begun[key] else None)
                if value is None:
                    raise RuntimeError(
                        f"{now.name(b)} was written by its name and by another name of the same tensor, in a pass that "
                        "leaves the model as it was, and is too large for a second copy. Let the model write it by "
                        "one name."
                    )
                b.copy_(value)


def versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Versions of the parameters, frozen ones included, which tell whether one was written since."""
    return {name: (writes(p), p.data_ptr()) for name, p in model.named_parameters()}


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
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)
