"""Our entries in the benchmark harness: one training step of each optimizer, and curvature of one batch.

The harness (its ``registry``, ``peers_optim`` and workloads) lies outside this repository; this file is found by it
through ``PYTHONPATH``.
"""

from __future__ import annotations

from typing import Any

import ours_curvature  # noqa: F401  (registers its entries)
from peers_optim import plain
from registry import register

import precond


def _layerwise(name: str, cls: Any, **fixed: Any) -> None:
    @register(name, "optim", grid=[{"interval": 10, "lr": 0.03, "damping": 1e-2}])
    def _(w: Any, interval: int = 1, lr: float = 1e-4, damping: float = 1e-3, momentum: float = 0.9) -> Any:
        optimizer = cls(
            w.model,
            w.loss_fn,
            lr=lr,
            damping=damping,
            momentum=momentum,
            curvature_update_period=interval,
            inverse_update_period=interval,
            **fixed,
        )
        return plain(w, optimizer)


_layerwise("precond KFAC", precond.KFAC)
_layerwise("precond KFAC empirical", precond.KFAC, fisher="empirical")
_layerwise("precond EKFAC", precond.EKFAC)
