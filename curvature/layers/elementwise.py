"""Bare parameters: broadcast sums, products and expansions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.rules import rule_for
from curvature.layers.site import ElementwiseSite, Observer, Ref, RowLayout


class BroadcastSite(ElementwiseSite):
    r"""One use of a parameter in :math:`y = c \odot p + \dots`, with ``p`` broadcast against the rest.

    Args:
        weight: The parameter.
        shape: Shape in which the operation saw it.
        factor: Its multiplier: another tensor, or a number.
    """

    def __init__(
        self, weight: Ref, shape: torch.Size, factor: Tensor | float, layout: RowLayout, operation: str
    ) -> None:
        super().__init__(weight, None, layout, operation)
        self.shape = shape
        self.factor = self.save(factor) if isinstance(factor, Tensor) else factor

    def blocks(self, joint: bool) -> list[tuple[str, Block]]:
        assert self.weight is not None
        if self.weight.transposed:
            part = self.weight.part(tuple(reversed(self.weight.shape)), permutation=(1, 0))
        else:
            # Views of one parameter in several shapes share one block.
            part = self.weight.part((self.weight.numel,), split=(self.weight.numel,))
        return [("weight", Block(self.weight.label, (part,)))]

    def _terms(self, gradient: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Gradients times factors, ``(k, *output)``, and the shape of the parameter against these axes."""
        factor = self.factor.to(gradient.dtype) if isinstance(self.factor, Tensor) else self.factor
        g = gradient * factor
        return g, (1,) * (g.dim() - 1 - len(self.shape)) + tuple(self.shape)

    def per_row(self, piece: str, gradient: Tensor) -> Tensor:
        g, shape = self._terms(gradient)
        free, own = [[a + 1 for a, size in enumerate(shape) if (size == 1) == one] for one in (True, False)]
        g = g.permute(0, *free, *own)
        return g.reshape(len(g), -1, *self._block_shape)

    @property
    def _block_shape(self) -> tuple[int, ...]:
        assert self.weight is not None
        return tuple(self.shape) if self.weight.transposed else (self.weight.numel,)

    def per_sample(self, piece: str, gradient: Tensor) -> Tensor:
        g, shape = self._terms(gradient)
        batch = self.layout.batch
        batched = self.layout.batched and batch is not None and g.dim() > 1 and g.shape[1] == batch
        batched = batched and (shape[0] == 1 or len(shape) == 0)
        free = [axis + 1 for axis, size in enumerate(shape) if size == 1 and not (batched and axis == 0)]
        g = g.sum(free, keepdim=True) if free else g
        return g.reshape(g.shape[0], g.shape[1] if batched else 1, *self._block_shape)


def _broadcast(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], operation: str, product: bool, signs: tuple[float, float]
) -> BroadcastSite | None:
    if len(args) < 2:
        return None
    if output is args[0] and output._base is not None:
        return None  # in place on a view: later calls may use its base, whose graph lacks this output
    refs = [recorder.resolve(arg) if isinstance(arg, Tensor) else None for arg in args[:2]]
    if (refs[0] is None) == (refs[1] is None):
        return None  # without a parameter, or with two, whose product is not linear in either
    which = 0 if refs[0] is not None else 1
    ref, other = refs[which], args[1 - which]
    assert ref is not None
    factor: Tensor | float = other if product else signs[which]
    return BroadcastSite(ref, args[which].shape, factor, recorder.layout(output), operation)


@rule_for(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def add(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BroadcastSite | None:
    """``x + p``."""
    if kwargs.get("alpha", 1) != 1:
        return None
    return _broadcast(recorder, output, args, "add", False, (1.0, 1.0))


@rule_for(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__)
def sub(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BroadcastSite | None:
    """``x - p``."""
    if kwargs.get("alpha", 1) != 1:
        return None
    return _broadcast(recorder, output, args, "sub", False, (1.0, -1.0))


@rule_for(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BroadcastSite | None:
    """``x * p``."""
    return _broadcast(recorder, output, args, "mul", True, (1.0, 1.0))


@rule_for(Tensor.expand, Tensor.expand_as, Tensor.repeat)
def expand(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> BroadcastSite | None:
    """``p.expand(n, ...)``, as class tokens are prepared."""
    ref = recorder.resolve(args[0])
    if ref is None:
        return None
    seen = args[0].shape
    padded = (1,) * (output.dim() - len(seen)) + tuple(seen)
    if any(have not in (1, want) for have, want in zip(padded, output.shape, strict=True)):
        return None  # repeat() of an axis longer than one
    batched = output.dim() > 0 and output.shape[0] == recorder.batch
    return BroadcastSite(ref, seen, 1.0, RowLayout(recorder.batch, batched), "expand")
