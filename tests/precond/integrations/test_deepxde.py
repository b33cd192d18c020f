"""Does GaussNewton solve a problem that is written for DeepXDE, as docs/how-to/physics.md has it?"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from precond import GaussNewton

os.environ.setdefault("DDE_BACKEND", "pytorch")
dde: Any = pytest.importorskip("deepxde")

PI = math.pi


@pytest.fixture
def float64():
    dde.config.set_default_float("float64")
    yield
    dde.config.set_default_float("float32")
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def source(x: Any) -> Any:
    return 2 * PI**2 * torch.sin(PI * x[:, :1]) * torch.sin(PI * x[:, 1:])


def equation(x: Tensor, u: Tensor) -> Tensor:
    return dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1) + source(x)


def residuals_of(data: Any, net: torch.nn.Module) -> list[Tensor]:
    x = torch.tensor(data.train_x, dtype=torch.float64, requires_grad=True)
    u = net(x)
    ends = [0]
    for count in data.num_bcs:
        ends.append(ends[-1] + count)
    found = [data.pde(x, u)[ends[-1] :]]
    found += [bc.error(data.train_x, x, u, a, b) for bc, a, b in zip(data.bcs, ends, ends[1:], strict=False)]
    dde.grad.clear()
    return [r / len(r) ** 0.5 for r in found]


def test_a_problem_of_deepxde_is_solved(float64: None) -> None:
    dde.config.set_random_seed(0)
    square = dde.geometry.Rectangle([0, 0], [1, 1])
    edge = dde.icbc.DirichletBC(square, lambda x: 0, lambda x, on_boundary: on_boundary)
    data = dde.data.PDE(square, equation, edge, num_domain=100, num_boundary=40, train_distribution="pseudo")
    net = dde.nn.FNN([2, 12, 1], "tanh", "Glorot normal")
    x = torch.tensor(data.train_x, dtype=torch.float64, requires_grad=True)
    theirs = data.losses(None, net(x), lambda _, r: r.square().mean(), x, SimpleNamespace(net=net))
    dde.grad.clear()
    optimizer = GaussNewton(net)
    first = float(optimizer.step(lambda: residuals_of(data, net)))
    assert first == pytest.approx(0.5 * float(sum(theirs).detach()), rel=1e-10)  # half of what DeepXDE minimises
    for _ in range(15):
        optimizer.step(lambda: residuals_of(data, net))
    x = torch.rand(500, 2, dtype=torch.float64)
    exact = torch.sin(PI * x[:, :1]) * torch.sin(PI * x[:, 1:])
    assert float((net(x) - exact).detach().norm() / exact.norm()) < 0.1
