"""Is Newton-Muon the inverse of the inputs' second moment, by ``precondition()``, and then Muon's step?"""

from __future__ import annotations

import torch
from torch import nn

from curvature import InputKronecker
from precond import Momentum, Muon, PreconditionedOptimizer
from precond.gradient.muon import orthogonalized
from solvers import Eigh, RelativeTikhonov


def test_newton_muon_is_two_optimizers_in_a_row(generator):
    layer = nn.Linear(3, 4, bias=False).double()
    before, loss_fn = layer.weight.detach().clone(), nn.MSELoss()
    x, y = (torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (3, 4))  # two examples, 5 positions
    inputs = PreconditionedOptimizer(
        layer,
        loss_fn,
        curvature=InputKronecker("empirical"),
        damping=RelativeTikhonov(0.2),
        solver=Eigh(),
        lr=1.0,
        momentum=0.0,
        kl_clip=None,
    )
    muon = Muon(layer.parameters(), lr=0.1, scaling="none", momentum=Momentum(0.0))
    loss_fn(layer(x), y).backward()
    gradient, rows = layer.weight.grad.clone(), x.flatten(0, 1)
    inputs.precondition()
    second = rows.mT @ rows / len(rows)
    wanted = gradient @ torch.linalg.inv(second + 0.2 * second.trace() / 3 * torch.eye(3))
    torch.testing.assert_close(layer.weight.grad, wanted)
    muon.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * orthogonalized(wanted, "polar_express"))
