"""The contenders: optimizers, their grids, and the best settings found there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from precond.layerwise.ekfac import EKFAC
from precond.layerwise.kfac import KFAC
from precond.step.loop import Loop
from precond.step.options import TrustRegion

Settings = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """An optimizer and the grid it is tuned on.

    Attributes:
        name: Name in tables and figures.
        make: Optimizer of a model and its loss, with the settings as keywords.
        axes: Setting -> values to try.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    axes: dict[str, tuple[float, ...]]

    def grid(self) -> list[Settings]:
        """All combinations."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    def at_edge(self, settings: Settings) -> list[str]:
        """Settings at the border of the grid, where a better value may lie beyond."""
        return [name for name, values in self.axes.items() if settings[name] in (min(values), max(values))]


# The same on both tasks, and not tuned on the grid; the bound is the one that the learning rates below were found with.
SECOND_ORDER = {
    "kl_clip": TrustRegion(1e-3, of="direction"),
    "momentum": 0.9,
    "curvature_update_period": 5,
    "inverse_update_period": 10,
}


def kfac(model: nn.Module, loss_fn: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    """K-FAC."""
    return KFAC(model, loss_fn, lr=lr, damping=damping, loop=Loop(nonfinite="raise"), **SECOND_ORDER)  # type: ignore[arg-type]


def ekfac(model: nn.Module, loss_fn: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    """EKFAC."""
    return EKFAC(model, loss_fn, lr=lr, damping=damping, loop=Loop(nonfinite="raise"), **SECOND_ORDER)  # type: ignore[arg-type]


def adamw(model: nn.Module, loss_fn: nn.Module, lr: float, beta2: float) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2))


def sgd(model: nn.Module, loss_fn: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


# Fifteen points for everyone: five learning rates, each about three times the next, and three values of the next most
# important option. Large learning rates come first: they diverge or set a mark that ends slower runs early.
CONTENDERS = (
    Contender("K-FAC", kfac, {"lr": (1.0, 0.3, 0.1, 0.03, 0.01), "damping": (1e-3, 3e-3, 1e-2)}),
    Contender("EKFAC", ekfac, {"lr": (1.0, 0.3, 0.1, 0.03, 0.01), "damping": (1e-3, 3e-3, 1e-2)}),
    Contender("AdamW", adamw, {"lr": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3), "beta2": (0.9, 0.95, 0.999)}),
    Contender("SGD", sgd, {"lr": (3.0, 1.0, 0.3, 0.1, 0.03), "momentum": (0.8, 0.9, 0.95)}),
)

# Found with `python -m precond demo --tune` on the grids above: fewest steps to the target, summed over two seeds; ties
# go to the smaller learning rate. The demo runs at a third seed.
TUNED: dict[tuple[str, str], Settings] = {
    ("autoencoder", "K-FAC"): {"lr": 0.3, "damping": 0.003},
    ("autoencoder", "EKFAC"): {"lr": 0.1, "damping": 0.003},
    ("autoencoder", "AdamW"): {"lr": 0.003, "beta2": 0.95},
    ("autoencoder", "SGD"): {"lr": 1.0, "momentum": 0.9},
    ("classifier", "K-FAC"): {"lr": 0.1, "damping": 0.001},
    ("classifier", "EKFAC"): {"lr": 0.03, "damping": 0.01},
    ("classifier", "AdamW"): {"lr": 0.03, "beta2": 0.999},
    ("classifier", "SGD"): {"lr": 0.3, "momentum": 0.9},
}
