"""The scale of a GradScaler."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor


def scale_in_use() -> Tensor | float:
    """The scale of the GradScaler whose ``step()`` is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler.get_scale()
        frame = frame.f_back
    return 1.0
