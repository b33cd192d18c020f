"""Layers whose passes send messages to other processes, which passes of the library's own must not do."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def world_size() -> int:
    """Number of processes of the whole run, 1 where there is no run of several."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


def refuse_synchronized(model: nn.Module, method: str = "curvature") -> None:
    """Refuse layers whose passes send messages, because the passes of curvature would send them as well.

    Raises:
        NotImplementedError: If the model has a ``SyncBatchNorm`` that takes the statistics of several processes.
    """
    for name, module in model.named_modules() if world_size() > 1 else ():
        if isinstance(module, nn.SyncBatchNorm) and module.training and dist.get_world_size(module.process_group) > 1:
            raise NotImplementedError(
                f"{method}: {name or 'the model'} is a SyncBatchNorm, whose passes send messages to other ranks, also "
                "those that run for the curvature, of which ranks may have different numbers. Leave BatchNorm as it "
                "is, or freeze the layer by eval(); methods that use gradients alone (SOAP, Shampoo, Muon) take it as "
                "it is."
            )
