"""Rules for functions that sum up, sort or mix along some axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.layers.axes.calls import (
    MIXED,
    Call,
    Handle,
    Result,
    Rule,
    axis_of,
    contract,
    dims_of,
    functions,
    right,
    rule,
)
from curvature.layers.axes.elementwise import elementwise
from curvature.layers.axes.moves import without

_REDUCTIONS = (
    "sum nansum mean nanmean prod std var std_mean var_mean amax amin aminmax logsumexp argmax argmin all any "
    "count_nonzero median nanmedian mode max min"
)


def reduced(call: Call, dims: tuple[int, ...] | None) -> Result:
    """The axes ``dims`` are summed up, or kept with one entry."""
    x = call.args[0]
    if not dims or not call.constant(*call.args[1:]):
        return MIXED
    if len(call.outputs[0].shape) == len(x.shape):  # keepdim
        state = axis_of(call, x)
        return MIXED if state is None or state.axis in dims else state
    return without(call, x, dims)


@rule(_REDUCTIONS)
def _reduction(call: Call) -> Result:
    value = call.get(1, "dim", call.kwargs.get("axis"))
    if type(value) is Handle or "other" in call.kwargs:
        return elementwise(call)  # max(x, y)
    return reduced(call, dims_of(value, len(call.args[0].shape)))


@rule("norm", *functions("norm vector_norm", [torch.linalg]))
def _norm(call: Call) -> Result:
    return reduced(call, dims_of(call.get(2, "dim"), len(call.args[0].shape)))


def along(position: int, default: Any = None, names: Sequence[str] = ("dim", "dims")) -> Rule:
    """Rule for functions that mix entries along the axes of one argument only, and keep the number of axes."""

    def apply(call: Call) -> Result:
        x = call.args[0]
        value = call.get(position, names[0], next((call.kwargs[n] for n in names if n in call.kwargs), default))
        if position == 1 and call.func is Tensor.flip:
            value = call.args[1] if isinstance(call.get(1, "dims"), tuple) else call.args[1:]
        dims, state = dims_of(value, len(x.shape)), axis_of(call, x)
        return MIXED if not dims or state is None or state.axis in dims or not call.constant(call.besides(x)) else state

    return apply


rule("softmax log_softmax softmin cumsum+ cumprod+ cummax cummin logcumsumexp flip")(along(1))
rule("sort argsort glu")(along(1, -1))
rule("topk")(along(2, -1))
rule("gumbel_softmax")(along(4, -1))
rule("kthvalue")(along(2, -1))
rule("roll")(along(2))
rule("diff")(along(2, -1))
rule("normalize")(along(2, 1))
rule("unfold", places=[Tensor], sharing=True)(along(1, names=("dimension",)))
rule("fft ifft rfft irfft hfft ihfft", places=[torch.fft])(along(2, -1))
rule("fft2 ifft2 rfft2 irfft2", places=[torch.fft])(along(2, (-2, -1)))
rule("fftn ifftn rfftn irfftn", places=[torch.fft])(along(2))
rule("fftshift ifftshift", places=[torch.fft])(along(1))
rule("softmax log_softmax", places=[torch.special])(along(1))


@rule("cosine_similarity pairwise_distance")
def _similarity(call: Call) -> Result:
    """Elementwise, then one axis is summed up."""
    x, y = call.args[:2]
    width = max(len(x.shape), len(y.shape))
    by_name = call.func in functions("cosine_similarity")
    dim = dims_of(call.get(2, "dim", 1) if by_name else -1, width)
    if dim is None or len(call.outputs[0].shape) != width - 1:
        return MIXED
    return contract(call, [d for d in range(width) if d != dim[0]], *((h, right(h, width)) for h in (x, y)))
