"""Convolutions, as dense layers on patches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.block import BlockPart
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import Observer, OuterSite, Ref, RowLayout


def per_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """An option for each spatial dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) if len(value) == dims else tuple(value) * dims


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Tensor:
    """Patches ``(n, *out, c, *kernel)`` a convolution sees in ``x (n, c, *space)``; a strided view where possible."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    elif padding == "valid":
        pads = [(0, 0)] * len(kernel)
    else:
        pads = [(int(p), int(p)) for p in padding]
    if any(left or right for left, right in pads):
        x = F.pad(x, [side for pair in reversed(pads) for side in pair])
    dims = len(kernel)
    for axis, (k, step, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, step)[..., ::d]
    return x.movedim(1, 1 + dims)


@dataclass(frozen=True)
class Window:
    """How a kernel moves over the spatial dimensions: one number for each."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, call: Mapping[str, Any], dims: int) -> Window:
        """From the arguments of a call."""
        padding = call.get("padding", 0)
        return cls(
            per_axis(call.get("stride", 1), dims),
            padding if isinstance(padding, str) else per_axis(padding, dims),
            per_axis(call.get("dilation", 1), dims),
            per_axis(call.get("output_padding", 0), dims),
        )


class PatchSite(OuterSite):
    """One use of a convolution: every output position is a dense layer on its patch, one per group.

    Args:
        input: ``(n, c, *space)``, or ``(c, *space)`` without a batch.
        weight_shape: Shape of the weight; all but its first two dimensions are spatial.
        window: How the kernel moves.
        groups: Number of groups; each is a separate layer.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        input: Tensor,
        weight_shape: tuple[int, ...],
        weight: Ref | None,
        bias: Ref | None,
        layout: RowLayout,
        window: Window,
        groups: int,
    ) -> None:
        super().__init__(weight, bias, layout, self.kind)
        self.dims, self.weight_shape, self.window, self.groups = len(weight_shape) - 2, weight_shape, window, groups
        self.input = self.save(input) if weight is not None else None

    @classmethod
    def of_call(cls, recorder: Observer, call: Mapping[str, Any]) -> Self | None:
        """The use that a call with these arguments is, if a tracked parameter is in it."""
        weight, bias = recorder.resolve(call["weight"]), recorder.resolve(call.get("bias"))
        if (weight is None and bias is None) or (weight is not None and weight.transposed):
            return None
        x, shape = call["input"], tuple(call["weight"].shape)
        window = Window.of(call, len(shape) - 2)
        return cls(x, shape, weight, bias, recorder.layout(x), window, int(call.get("groups", 1)))

    @abstractmethod
    def patches(self, x: Tensor) -> Tensor:
        """The patch of each output position in ``x (n, c, *space)``: ``(n, *out, c, *kernel)``."""

    def inputs(self) -> Tensor:
        assert self.input is not None
        p = self.patches(self.input if self.input.dim() == self.dims + 2 else self.input.unsqueeze(0))
        # Written as (c, *kernel, n, *out): neighbours in the image stay neighbours in memory, which makes the copy five
        # times as fast as patch by patch, and the rows of one example, or of all, are a matrix without another copy.
        lead, taps = range(self.dims + 1), range(self.dims + 1, p.dim())
        p = p.permute(*taps, *lead).flatten(0, self.dims).movedim(0, -1)
        if self.groups > 1:
            p = p.unflatten(-1, (self.groups, -1)).movedim(-2, 0)
        return self.layout.rows(p, 1 + self.dims)

    def gradients(self, gradient: Tensor) -> Tensor:
        g = gradient if gradient.dim() == self.dims + 3 else gradient.unsqueeze(1)
        g = g.movedim(2, -1)  # (k, n, *out, c)
        if self.groups > 1:
            g = g.unflatten(-1, (self.groups, -1)).movedim(-2, 0)
        return self.layout.rows(g, 1 + self.dims)


class ConvSite(PatchSite):
    """One use of ``conv1d``, ``conv2d`` or ``conv3d``; the weight is ``(c_out, c_in / groups, *kernel)``."""

    kind = "convolution"

    @property
    def dense(self) -> bool:
        """Whether its patches do not overlap: a dense layer on patches, or with a kernel of one entry on pixels."""
        sizes, window = self.weight_shape[2:], self.window
        reach = (1 + dilation * (size - 1) for size, dilation in zip(sizes, window.dilation, strict=True))
        return all(size <= stride for size, stride in zip(reach, window.stride, strict=True))

    def patches(self, x: Tensor) -> Tensor:
        return patches(x, self.weight_shape[2:], self.window.stride, self.window.padding, self.window.dilation)

    def weight_part(self) -> BlockPart:
        assert self.weight is not None
        d_out = self.weight_shape[0]
        d_in = self.weight.numel // d_out
        shape = (d_out, d_in) if self.groups == 1 else (self.groups, d_out // self.groups, d_in)
        return self.weight.part(shape)


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@rule_for(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    modules={nn.Conv1d: "kronecker", nn.Conv2d: "kronecker", nn.Conv3d: "kronecker"},
)
def convolution(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ConvSite | None:
    """``F.conv1d``, ``conv2d``, ``conv3d`` with any stride, padding, dilation and groups."""
    return ConvSite.of_call(recorder, bind(_ARGUMENTS, args, kwargs))
