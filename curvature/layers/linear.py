"""Dense layers: ``F.linear``, ``addmm`` and matrix products with a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.block import BlockPart
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import Observer, OuterSite, Ref, RowLayout


class LinearSite(OuterSite):
    r"""One use of :math:`y = W a + b` on the last axis of its input.

    Args:
        input: ``(*lead, d_in)``.
        weight_shape: ``(d_out, d_in)``.
        weight: Tracked weight, stored as ``(d_out, d_in)``, or transposed.
        columns: The output is ``(*, d_out, s)``: the weight stands on the left.
    """

    def __init__(
        self,
        input: Tensor,
        weight_shape: tuple[int, int],
        weight: Ref | None,
        bias: Ref | None,
        layout: RowLayout,
        operation: str = "linear",
        columns: bool = False,
    ) -> None:
        super().__init__(weight, bias, layout, operation)
        self.d_out, self.d_in = weight_shape
        self.columns = columns
        self.lead = input.dim() - 1
        self.input = self.save(input) if weight is not None else None

    @property
    def dense(self) -> bool:
        return self.operation != "recurrent"

    def inputs(self) -> Tensor:
        assert self.input is not None
        return self.layout.rows(self.input, self.lead)

    def gradients(self, gradient: Tensor) -> Tensor:
        return self.layout.rows(gradient.mT if self.columns else gradient, self.lead)

    def weight_part(self) -> BlockPart:
        assert self.weight is not None
        if self.weight.transposed:  # stored (d_in, d_out)
            return self.weight.part((self.d_out, self.d_in), (self.d_in, self.d_out), (1, 0))
        return self.weight.part((self.d_out, self.d_in), (self.d_out, self.d_in))


@rule_for(F.linear, modules={nn.Linear: "kronecker", nn.modules.linear.NonDynamicallyQuantizableLinear: "kronecker"})
def linear(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LinearSite | None:
    """``F.linear(input, weight, bias)``."""
    call = bind(("input", "weight", "bias"), args, kwargs)
    weight, bias = recorder.resolve(call["weight"]), recorder.resolve(call.get("bias"))
    if (weight is None and bias is None) or call["weight"].dim() != 2:
        return None
    return LinearSite(call["input"], tuple(call["weight"].shape), weight, bias, recorder.layout(call["input"]))


@rule_for(torch.addmm, Tensor.addmm)
def addmm(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LinearSite | None:
    """``addmm(bias, x, weight)``, as Hugging Face's ``Conv1D`` calls it."""
    call = bind(("input", "mat1", "mat2"), args, kwargs)
    if call.get("alpha", 1) != 1 or call.get("beta", 1) != 1 or recorder.resolve(call["mat1"]) is not None:
        return None
    weight, bias = recorder.resolve(call["mat2"]), recorder.resolve(call["input"])
    if bias is not None and call["input"].dim() != 1:
        return None
    if weight is None and bias is None:
        return None
    d_in, d_out = call["mat2"].shape
    return LinearSite(call["mat1"], (d_out, d_in), transpose(weight), bias, recorder.layout(call["mat1"]), "addmm")


@rule_for(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LinearSite | None:
    """``x @ W`` with a 2-D parameter on the right, or ``W @ x`` where ``x`` has leading dimensions."""
    call = bind(("input", "other"), args, kwargs)
    left, right = call["input"], call.get("other", call.get("mat2"))
    if not isinstance(right, Tensor):
        return None
    on_left, on_right = recorder.resolve(left), recorder.resolve(right)
    if (on_left is None) == (on_right is None):
        return None
    if on_right is not None and right.dim() == 2 and left.dim() >= 2:
        d_in, d_out = right.shape
        return LinearSite(left, (d_out, d_in), transpose(on_right), None, recorder.layout(left), "matmul")
    if on_left is not None and left.dim() == 2 and right.dim() >= 3:
        d_out, d_in = left.shape
        return LinearSite(right.mT, (d_out, d_in), on_left, None, recorder.layout(right), "matmul", columns=True)
    return None


def transpose(ref: Ref | None) -> Ref | None:
    """The reference to a matrix seen from the other side: ``x @ M`` is ``F.linear(x, M^T)``."""
    if ref is None:
        return None
    return Ref(ref.name, ref.start, ref.shape, not ref.transposed, ref.whole)
