"""Bilinear layers, as dense layers on products of their two inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvature.layers.block import BlockPart
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import Observer, OuterSite, Ref, RowLayout


class BilinearSite(OuterSite):
    r"""One use of :math:`y_o = x^\top W_o z + b_o`: a dense layer on ``x (x) z``, formed when needed."""

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        weight_shape: tuple[int, ...],
        weight: Ref | None,
        bias: Ref | None,
        layout: RowLayout,
    ) -> None:
        super().__init__(weight, bias, layout, "bilinear")
        self.weight_shape = weight_shape
        self.lead = left.dim() - 1
        self.factors = (self.save(left), self.save(right)) if weight is not None else None

    def inputs(self) -> Tensor:
        assert self.factors is not None
        left, right = self.factors
        return self.layout.rows((left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2), self.lead)

    def gradients(self, gradient: Tensor) -> Tensor:
        return self.layout.rows(gradient, self.lead)

    def weight_part(self) -> BlockPart:
        assert self.weight is not None
        d_out, d_left, d_right = self.weight_shape
        return self.weight.part((d_out, d_left * d_right))


@rule_for(torch.bilinear, modules={nn.Bilinear: "kronecker"})
def bilinear(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> BilinearSite | None:
    """``F.bilinear(input1, input2, weight, bias)``."""
    call = bind(("input1", "input2", "weight", "bias"), args, kwargs)
    weight, bias = recorder.resolve(call["weight"]), recorder.resolve(call.get("bias"))
    if (weight is None and bias is None) or (weight is not None and weight.transposed):
        return None
    return BilinearSite(
        call["input1"], call["input2"], tuple(call["weight"].shape), weight, bias, recorder.layout(output)
    )
