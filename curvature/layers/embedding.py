"""Embeddings, as dense layers on one-hot inputs that are never formed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.block import BlockPart
from curvature.layers.rules import bind, rule_for
from curvature.layers.samples import OneHot
from curvature.layers.site import Observer, OuterSite, Ref, RowLayout


class EmbeddingSite(OuterSite):
    r"""One look-up :math:`y_{ns} = E^\top e_{id(n, s)}` in a table ``E (V, d)``; the block tensor is ``E^T (d, V)``."""

    def __init__(self, index: Tensor, table: tuple[int, int], weight: Ref, padding_idx: int | None, layout: RowLayout):
        super().__init__(weight, None, layout, "embedding")
        self.index = self.save(index)
        self.size, self.d_out = table
        self.padding_idx = padding_idx

    def inputs(self) -> OneHot:
        index = self.layout.rows(self.index.unsqueeze(-1), self.index.dim()).squeeze(-1)
        # The gradient of the padding row is cut by embedding itself: it is left out of the curvature.
        keep = None if self.padding_idx is None else index != self.padding_idx
        return OneHot(index, self.size, keep)

    def gradients(self, gradient: Tensor) -> Tensor:
        return self.layout.rows(gradient, self.index.dim())

    def weight_part(self) -> BlockPart:
        assert self.weight is not None
        return table_part(self.weight, (self.size, self.d_out))


def table_part(weight: Ref, table: tuple[int, int]) -> BlockPart:
    """A table ``(V, d)``, or its transpose, as block columns ``(d, V)``."""
    size, d_out = table
    if weight.transposed:
        return weight.part((d_out, size), (d_out, size))
    return weight.part((d_out, size), (size, d_out), (1, 0))


@rule_for(F.embedding, modules={nn.Embedding: "kronecker"})
def embedding(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> EmbeddingSite | None:
    """``F.embedding``; a gradient scaled by frequency does not belong to a loss and is left to the fallback."""
    call = bind(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"), args, kwargs
    )
    weight = recorder.resolve(call["weight"])
    if weight is None or call.get("scale_grad_by_freq"):
        return None
    padding = call.get("padding_idx")
    if padding is not None and padding < 0:
        padding += call["weight"].shape[0]
    return EmbeddingSite(call["input"], tuple(call["weight"].shape), weight, padding, recorder.layout(call["input"]))


@rule_for(Tensor.__getitem__, Tensor.index_select, torch.index_select)
def rows_of_table(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> EmbeddingSite | None:
    """``table[index]`` and ``table.index_select(0, index)`` with a tensor of integers, as relative positions use it."""
    if kwargs or (len(args) == 3 and args[1] != 0):
        return None
    table, index = args[0], args[-1]
    weight = recorder.resolve(table)
    if weight is None or table.dim() != 2 or not isinstance(index, Tensor) or index.dtype not in _INTEGERS:
        return None
    # Negative numbers count from the end.
    index = index.remainder(table.shape[0])
    return EmbeddingSite(index, tuple(table.shape), weight, None, recorder.layout(args[-1]))


_INTEGERS = (torch.int64, torch.int32)
