"""Rules for losses without reduction."""

from __future__ import annotations

import torch.nn.functional as F

from curvature.layers.axes.calls import (
    MIXED,
    Call,
    Result,
    contract,
    rule,
)
from curvature.layers.axes.elementwise import elementwise


@rule(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "poisson_nll_loss gaussian_nll_loss soft_margin_loss",
    places=[F],
)
def _elementwise_loss(call: Call) -> Result:
    bound = call.bound()
    unreduced = bound["reduction"] == "none" and bound.get("reduce") is None and bound.get("size_average") is None
    return elementwise(call) if unreduced else MIXED


@rule("cross_entropy nll_loss", places=[F])
def _class_loss(call: Call) -> Result:
    bound = call.bound()
    x, target, weight = bound["input"], bound["target"], bound["weight"]
    unreduced = bound["reduction"] == "none" and bound["reduce"] is None and bound["size_average"] is None
    if not unreduced or len(x.shape) < 2 or not call.constant(weight):
        return MIXED
    labels = [0, "class", *range(2, len(x.shape))]
    out = [0, *range(2, len(x.shape))]
    return contract(call, out, (x, labels), (target, labels if len(target.shape) == len(x.shape) else out))
