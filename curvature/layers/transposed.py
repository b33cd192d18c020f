"""Transposed convolutions, as dense layers on patches of the zero-stuffed input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.block import BlockPart
from curvature.layers.conv import PatchSite, patches
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import Observer


class TransposedConvSite(PatchSite):
    r"""One use of ``conv_transpose1d``, ``2d`` or ``3d``; the weight is ``(c_in, c_out / groups, *kernel)``.

    Output position p receives :math:`y_p = \sum_k W_k^\top x_q` from the input positions q with
    :math:`q \cdot stride = p + padding - k \cdot dilation`. With ``stride - 1`` zeros between the inputs this is an
    ordinary convolution with the flipped kernel, and so a dense layer ``(c_out, c_in * kernel)`` on patches.

    References:
        Dumoulin and Visin (2016), section 4, https://arxiv.org/abs/1603.07285
    """

    kind = "transposed convolution"

    def patches(self, x: Tensor) -> Tensor:
        kernel, window = self.weight_shape[2:], self.window
        assert not isinstance(window.padding, str)
        space = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], window.stride, strict=True)]
        stuffed = x.new_zeros(*x.shape[:2], *space)
        every = stuffed
        for axis, step in enumerate(window.stride):
            every = every.unfold(2 + axis, 1, step).squeeze(-1)
        every.copy_(x)
        reach = [d * (k - 1) for d, k in zip(window.dilation, kernel, strict=True)]
        sides = [(r - p, r - p + o) for r, p, o in zip(reach, window.padding, window.output_padding, strict=True)]
        stuffed = F.pad(stuffed, [side for pair in reversed(sides) for side in pair])
        ones, zeros = (1,) * self.dims, (0,) * self.dims
        return patches(stuffed, kernel, ones, zeros, window.dilation).flip(list(range(-self.dims, 0)))

    def weight_part(self) -> BlockPart:
        assert self.weight is not None
        c_in, c_out, *kernel = self.weight_shape
        size = torch.Size(kernel).numel()
        d_in = c_in // self.groups * size
        if self.groups == 1:
            return self.weight.part((c_out, d_in), (c_in, c_out, size), (1, 0, 2))
        split = (self.groups, c_in // self.groups, c_out, size)
        return self.weight.part((self.groups, c_out, d_in), split, (0, 2, 1, 3))


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@rule_for(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    modules={nn.ConvTranspose1d: "kronecker", nn.ConvTranspose2d: "kronecker", nn.ConvTranspose3d: "kronecker"},
)
def transposed_convolution(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TransposedConvSite | None:
    """``F.conv_transpose1d``, ``2d``, ``3d`` with any stride, padding, output padding, dilation and groups."""
    return TransposedConvSite.of_call(recorder, bind(_ARGUMENTS, args, kwargs))
