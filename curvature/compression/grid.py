"""The grid that weights are rounded to: codes, scales and zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from solvers.outcome.arguments import choice, flag, whole

#: What shares one scale: the whole matrix, a row (output unit), or so many neighbouring inputs of a row.
Group = Literal["tensor", "row"] | int
#: How a scale is chosen: to span the weights of its group, or to make their weighted squared error least.
Fit = Literal["range", "error"]

#: Fractions of the full range that ``fit="error"`` tries.
_SHRINKS = tuple(1.0 - 0.02 * k for k in range(26))


def check_bits(name: str, value: Any) -> Any:
    """A whole number of bits, 1 to 16."""
    if whole(name, value) > 16:
        raise ValueError(f"{name} is a whole number from 1 to 16, not {value}.")
    return value


@dataclass(frozen=True)
class Codes:
    r"""A matrix on a grid: :math:`\hat W = s\, (q - z)`.

    Attributes:
        codes: ``q (*stack, d_out, d_in)``, integers from 0 to ``2^bits - 1``, as ``uint8`` (``int32`` over 8 bits).
        scale: ``s (*stack, d_out, groups)``.
        zero: ``z (*stack, d_out, groups)``, a whole number; ``2^(bits - 1)`` on a symmetric grid.
        bits: Bits of a code.
        size: Number of neighbouring inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    size: int

    def dequantize(self) -> Tensor:
        """The weights ``(*stack, d_out, d_in)``, in the dtype of the scales."""
        column = torch.arange(self.codes.shape[-1], device=self.codes.device) // self.size
        return (self.codes.to(self.scale.dtype) - self.zero[..., column]) * self.scale[..., column]

    @property
    def stored_bits(self) -> float:
        """Bits per weight with scales (16 bits each) and, off a symmetric grid, zeros (``bits`` each)."""
        zeros = 0 if bool((self.zero == 2 ** (self.bits - 1)).all()) else self.bits
        return self.bits + self.scale.numel() * (16 + zeros) / self.codes.numel()


@dataclass(frozen=True)
class Levels:
    """The values that each weight of a matrix may take: ``scale`` and ``zero`` of every entry, ``(d_out, d_in)``."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, x: Tensor, columns: slice | Tensor = slice(None), rows: slice = slice(None)) -> Tensor:
        """The nearest code of ``x``, entries ``[rows, columns]`` of the matrix."""
        scale, zero = self.scale[rows, columns], self.zero[rows, columns]
        return torch.clamp(torch.round(x / scale) + zero, 0, 2**self.bits - 1)

    def nearest(self, x: Tensor, columns: slice | Tensor = slice(None), rows: slice = slice(None)) -> Tensor:
        """The nearest value on the grid of ``x``, entries ``[rows, columns]`` of the matrix."""
        scale, zero = self.scale[rows, columns], self.zero[rows, columns]
        code = torch.clamp(torch.round(x / scale) + zero, 0, 2**self.bits - 1)
        return (code - zero) * scale

    def take(self, order: Tensor) -> Levels:
        """The levels of the columns in another order."""
        return Levels(self.scale[:, order], self.zero[:, order], self.bits)


@dataclass(frozen=True)
class Grid:
    r"""Which values the weights may take.

    With ``2^bits`` codes, a group of weights w has the scale and zero

    .. math::
        \text{symmetric:}\; s = \frac{2 \max |w|}{2^b - 1},\; z = 2^{b-1} \qquad
        \text{else:}\; s = \frac{\max(w, 0) - \min(w, 0)}{2^b - 1},\; z = \operatorname{round}(-\min(w, 0) / s)

    with ``fit="range"``. ``fit="error"`` tries smaller scales as well and keeps, for each group, the one with the least
    squared error of plain rounding, weighted by the curvature's diagonal: at four bits and fewer it pays to cut off
    outliers.

    Attributes:
        bits: 1 to 16.
        symmetric: Whether zero lies in the middle.
        group: ``"row"`` (one scale per output unit), ``"tensor"``, or the number of neighbouring inputs that share one.
        fit: ``"error"`` or ``"range"``.

    Raises:
        ValueError: If an option is out of range.
    """

    bits: int = 4
    symmetric: bool = True
    group: Group = "row"
    fit: Fit = "error"

    def __post_init__(self) -> None:
        """Validate the options."""
        check_bits("bits", self.bits)
        flag("symmetric", self.symmetric)
        if isinstance(self.group, int):
            whole("group", self.group)
        else:
            choice("group", self.group, ("tensor", "row"))
        choice("fit", self.fit, Fit)

    def size(self, d_in: int) -> int:
        """Number of neighbouring inputs that share a scale."""
        return min(self.group, d_in) if isinstance(self.group, int) else d_in

    def levels(self, W: Tensor, importance: Tensor | None = None) -> Levels:
        """The levels for a matrix.

        Args:
            W: ``(d_out, d_in)``.
            importance: Weights of the squared errors under ``fit="error"``, ``(d_in,)`` or ``(d_out, d_in)``; equal by
                default.
        """
        d_out, d_in = W.shape
        size = self.size(d_in)
        groups = -(-d_in // size)
        padded = torch.nn.functional.pad(W, (0, groups * size - d_in)).view(d_out, groups, size)
        weight = torch.ones_like(W) if importance is None else importance.to(W.dtype).expand_as(W)
        weight = torch.nn.functional.pad(weight, (0, groups * size - d_in)).view(d_out, groups, size)
        if self.group == "tensor":
            padded, weight = padded.reshape(1, 1, -1), weight.reshape(1, 1, -1)
        scale, zero = self._range(padded)
        if self.fit == "error":
            scale, zero = self._least_error(padded, weight, scale, zero)
        if self.group == "tensor":
            return Levels(scale[:, :, 0].expand(d_out, d_in), zero[:, :, 0].expand(d_out, d_in), self.bits)
        whole = (d_out, groups, size)
        return Levels(
            scale.expand(whole).reshape(d_out, -1)[:, :d_in], zero.expand(whole).reshape(d_out, -1)[:, :d_in], self.bits
        )

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero ``(rows, groups, 1)`` that span the weights ``(rows, groups, size)``."""
        top = 2**self.bits - 1
        if self.symmetric:
            span = 2 * w.abs().amax(-1, keepdim=True)
            zero = torch.full_like(span, 2 ** (self.bits - 1))
        else:
            low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
            span = high - low
            zero = torch.round(-low * top / torch.where(span > 0, span, 1.0))
        return torch.where(span > 0, span / top, 1.0), zero  # a group of zeros is exact on any scale

    def _least_error(self, w: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.full_like(scale, torch.inf)
        out = scale
        for shrink in _SHRINKS:
            tried = scale * shrink
            error = (weight * (Levels(tried, zero, self.bits).nearest(w) - w).square()).sum(-1, keepdim=True)
            out = torch.where(error < best, tried, out)
            best = torch.minimum(best, error)
        return out, zero
