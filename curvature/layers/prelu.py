"""PReLU: a slope for negative inputs, one for all channels or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvature.layers.elementwise import BroadcastSite
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import Observer


@rule_for(torch.prelu, modules={nn.PReLU: "diagonal"})
def prelu(recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BroadcastSite | None:
    r"""``F.prelu(x, p)``, that is :math:`\max(0, x) + p \odot \min(0, x)` with channels on axis 1."""
    call = bind(("input", "weight"), args, kwargs)
    x, ref = call["input"], recorder.resolve(call["weight"])
    if ref is None:
        return None
    channels = torch.Size((ref.numel, *(1,) * (x.dim() - 2)))
    return BroadcastSite(ref, channels, x.detach().clamp(max=0), recorder.layout(x), "prelu")
