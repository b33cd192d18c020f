"""Our entries in the benchmark harness: one training step of each optimizer, and curvature of one batch.

The harness (``registry``, ``peers_optim`` and workloads) is ``tests/benchmarks/harness``, or another with files of
these names that finds this one through ``PYTHONPATH``.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import ours_curvature  # noqa: F401  (registers its entries)
from peers_optim import plain
from registry import register

import precond

# Settings among which the time to a target loss is tuned, as many as peers have.
LAYERWISE = [
    {"interval": 10, "lr": lr, "damping": damping} for lr, damping in product((0.03, 0.1, 0.3), (1e-3, 1e-2, 1e-1))
]
GRADIENTS = [{"interval": 10, "lr": lr} for lr in (3e-3, 1e-2, 3e-2, 6e-2)]


def _layerwise(name: str, cls: Any, **fixed: Any) -> None:
    @register(name, "optim", grid=LAYERWISE)
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


def _gradient(name: str, cls: Any, period: str | None, **fixed: Any) -> None:
    @register(name, "optim", fixed=period is None, grid=GRADIENTS)
    def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
        own = {period: interval} if period else {}
        return plain(w, cls(w.params, lr=lr, **own, **fixed))


_gradient("precond SOAP", precond.SOAP, "inverse_update_period")
_gradient("precond Shampoo", precond.Shampoo, "inverse_update_period")
_gradient("precond KLShampoo", precond.KLShampoo, "inverse_update_period")
_gradient("precond PSGD", precond.PSGD, "curvature_update_period")


@register("precond SINGD", "optim", grid=LAYERWISE)
def _(w: Any, interval: int = 1, lr: float = 1e-4, damping: float = 1e-3, momentum: float = 0.9) -> Any:
    optimizer = precond.SINGD(
        w.model, w.loss_fn, lr=lr, damping=damping, momentum=momentum, curvature_update_period=interval
    )
    return plain(w, optimizer)


@register("precond Muon", "optim", fixed=True, grid=GRADIENTS)
def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
    return plain(w, precond.Muon(precond.param_groups(w.model, precond.Muon, (w.x, w.y)), lr=lr))
