"""The exported estimates of curvature, given to ``PreconditionedOptimizer`` by name, lower a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import curvature
from precond import PreconditionedOptimizer
from solvers import Cholesky, Eigh, FactoredTikhonov, Tikhonov, Woodbury

CHOICES: dict[str, tuple[Any, Any, Any]] = {
    "KroneckerFisher": (curvature.KroneckerFisher("mc"), FactoredTikhonov(1e-2), Cholesky()),
    "EigenbasisFisher": (curvature.EigenbasisFisher("mc"), Tikhonov(1e-2), Eigh()),
    "LayerFisher": (curvature.LayerFisher("mc"), Tikhonov(1e-2), Cholesky()),
    "UnitFisher": (curvature.UnitFisher("mc"), Tikhonov(1e-2), Cholesky()),
    "DiagonalFisher": (curvature.DiagonalFisher("mc"), Tikhonov(1e-2), Eigh()),
    "GramFisher": (curvature.GramFisher("mc"), Tikhonov(1e-2), Woodbury()),
    "SINGDFisher": (curvature.SINGDFisher("mc"), Tikhonov(1e-2), Cholesky()),
    "KroneckerBFGS": (curvature.KroneckerBFGS(), Tikhonov(1e-2), Cholesky()),
    "SketchedFisher": (curvature.SketchedFisher("mc"), Tikhonov(1e-2), Woodbury()),
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_step(name: str) -> None:
    estimate, damping, solver = CHOICES[name]
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    optimizer = PreconditionedOptimizer(
        model, loss_fn, curvature=estimate, damping=damping, solver=solver, lr=0.05, curvature_ema=0.0
    )
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
