"""Are derivatives along directions those of torch, inside a residual as well?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev

from precond import GaussNewton, PointwiseResidual, directional_derivatives, laplacian


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 2)).double()


def test_the_laplacian_is_the_trace_of_the_hessian():
    u, x = network(), torch.rand(3, dtype=torch.float64)
    expected = hessian(u)(x).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(laplacian(u, x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_along_a_direction(order):
    u, x, v = network(), torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected, f = [u(x)], u
    for _ in range(order):
        f = (lambda g: lambda z: jacrev(g)(z) @ v)(f)
        expected.append(f(x))
    found = directional_derivatives(u, x, v, order)
    assert len(found) == order + 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_residual_has_the_jacobian_of_the_one_by_hessians():
    points = torch.rand(7, 3, dtype=torch.float64)
    forward, reverse = network(1), network(1)

    def fast(u, x):
        return laplacian(u, x) + directional_derivatives(u, x, torch.tensor([1.0, 0.0, 0.0]).double(), 1)[1]

    def slow(u, x):
        return hessian(u)(x).diagonal(dim1=-2, dim2=-1).sum(-1) + jacrev(u)(x)[:, 0]

    for model, function in ((forward, fast), (reverse, slow)):
        optimizer = GaussNewton(model)
        for _ in range(3):
            optimizer.step(lambda m=model, f=function: PointwiseResidual(m, f, points))
    for p, q in zip(forward.parameters(), reverse.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_refuses_an_order_below_one():
    with pytest.raises(ValueError, match="order"):
        directional_derivatives(network(), torch.rand(3).double(), torch.rand(3).double(), 0)
