"""Are products with the Jacobian from the layers exact, and the factors those of the definition?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev

from curvature.residuals.layer_rows import layer_rows
from curvature.residuals.residual_rows import ResidualRows
from precond import GaussNewton, PointwiseResidual, directional_derivatives, laplacian
from precond.closure import gauss_newton
from precond.closure.layered import LayeredLeastSquares
from precond.closure.solver_choice import cheapest
from solvers import CG

F64 = torch.float64
ALONG = torch.tensor([1.0, 0.0, 0.0], dtype=F64)


class Skip(nn.Module):
    """A layer that is used twice, one without bias, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(3, 4, bias=False), nn.Linear(4, 4)
        self.fixed, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.fixed.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.again(torch.sin(self.again(h))))
        return self.last(torch.tanh(self.fixed(h)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 1)).double()


def equation(u, x):
    return laplacian(u, x) + u(x) * directional_derivatives(u, x, ALONG, 1)[1]


def boundary(u, x):
    return u(x) - x[0]


def parts(model, weight=0.7):
    points = torch.rand(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    return [PointwiseResidual(model, equation, points, weight), PointwiseResidual(model, boundary, points[:4])]


@pytest.mark.parametrize("make", [network, lambda: Skip().double()], ids=["network", "skip"])
def test_products_are_those_of_the_jacobian(make):
    model = make()
    params = [p for p in model.parameters() if p.requires_grad]
    problem = ResidualRows([layer_rows(part, params) for part in parts(model)], params)
    J = torch.cat([part.value_and_jacobian(params)[1] for part in parts(model)])
    v, w = torch.randn(J.shape[1], dtype=F64), torch.randn(J.shape[0], dtype=F64)
    torch.testing.assert_close(problem.push(v), J @ v, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(problem.pull(w), J.mT @ w, rtol=1e-11, atol=1e-12)
    residuals = torch.cat([r.reshape(-1) for r, _ in problem.parts])
    torch.testing.assert_close(residuals, torch.cat([part.value() for part in parts(model)]).detach())


def test_a_step_is_that_of_the_normal_equations():
    model = network()
    params = list(model.parameters())
    found = [layer_rows(part, params) for part in parts(model)]
    problem = LayeredLeastSquares(ResidualRows(found, params), CG(rtol=1e-12, max_steps=200, progress=False))
    J = torch.cat([part.value_and_jacobian(params)[1] for part in parts(model)])
    target = torch.randn(len(J), dtype=F64)
    expected = torch.linalg.solve(J.mT @ J + 1e-3 * torch.eye(J.shape[1], dtype=F64), J.mT @ target)
    torch.testing.assert_close(problem.fit(target, 1e-3), expected, rtol=1e-7, atol=1e-9)


def test_the_factors_of_a_laplacian_are_those_of_the_paper():
    """Of the middle layer, from inputs and output gradients of value, slopes and Laplacian, by torch.func alone."""
    model, points = network(), parts(network())[0].points
    before, layer, after = model[:2], model[2], model[3:]

    def components(f, x):
        return torch.stack([f(x), *jacrev(f)(x).mT, hessian(f)(x).diagonal(dim1=-2, dim2=-1).sum(-1)])

    def rest(y):  # the Laplacian of after(s) for s with the components y
        first, second = jacrev(after)(y[0])[0], hessian(after)(y[0])[0]
        return first @ y[-1] + (y[1:-1] @ second * y[1:-1]).sum()

    A, B = torch.zeros(5, 5, dtype=F64), torch.zeros(3, 3, dtype=F64)
    for x in points:
        z = components(before, x)
        ones = torch.tensor([1.0, 0, 0, 0, 0], dtype=F64).unsqueeze(1)
        hat = torch.cat([z, ones], 1)
        g = jacrev(rest)(z @ layer.weight.detach().mT + ones * layer.bias.detach())
        A += hat.mT @ hat / (len(points) * 5)
        B += g.mT @ g
    _, rows = layer_rows(PointwiseResidual(model, laplacian, points), list(model.parameters()))
    found = rows[1].factors()
    torch.testing.assert_close(found[0], A, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[1], B, rtol=1e-11, atol=1e-13)
    assert rows[1].weight is layer.weight


def test_the_preconditioner_inverts_the_damped_factors_of_one_kind_of_residual():
    model = network()
    params = list(model.parameters())
    points = parts(model)[0].points
    found = layer_rows(PointwiseResidual(model, laplacian, points), params)
    problem = LayeredLeastSquares(ResidualRows([found], params), CG(progress=False))
    v = torch.randn(sum(p.numel() for p in params), dtype=F64)
    pieces = dict(zip(params, v.split([p.numel() for p in params]), strict=True))
    expected = []
    for rows in found[1]:
        A, B = rows.factors()
        V = torch.cat([pieces[rows.weight].view_as(rows.weight), pieces[rows.bias].unsqueeze(1)], 1)
        dense = torch.kron(B, A) + 0.3 * torch.eye(V.numel(), dtype=F64)
        solved = torch.linalg.solve(dense, V.flatten()).view_as(V)
        expected += [solved[:, :-1].flatten(), solved[:, -1]]
    torch.testing.assert_close(problem.preconditioner(0.3) @ v, torch.cat(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["kfac", "auto"])
def test_gauss_newton_steps_by_layers_as_by_the_jacobian(solver, monkeypatch):
    monkeypatch.setattr(gauss_newton, "cheapest", partial(cheapest, largest=10))
    monkeypatch.setattr(gauss_newton, "_BY_LAYERS", CG(rtol=1e-13, max_steps=400, progress=False))
    ours, theirs = network(), network()
    options = {"scaled": False, "damping": 1e-2}
    by_layers = GaussNewton(ours, solver=solver, **({"damping": 1e-2} if solver == "auto" else options))
    by_jacobian = GaussNewton(theirs, solver="woodbury", **options)
    for _ in range(3):
        losses = by_layers.step(lambda: parts(ours)), by_jacobian.step(lambda: parts(theirs))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-9)
    assert by_layers.choice.solver == "kfac"
    torch.testing.assert_close(
        *(torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, theirs)), rtol=1e-5, atol=1e-7
    )


def test_other_parameters_are_found_and_solved_for_by_other_means(monkeypatch):
    monkeypatch.setattr(gauss_newton, "cheapest", partial(cheapest, largest=10))
    model = network()
    model.register_parameter("factor", nn.Parameter(torch.ones(1, dtype=F64)))
    points = parts(model)[0].points

    def residuals():
        return [PointwiseResidual(model, lambda u, x: u(x) - 1, points), model.factor - 2]

    def scaled():  # the weight of a layer is used outside of it
        return PointwiseResidual(model, lambda u, x: u(x) + model[0].weight.sum(), points)

    for closure in (residuals, scaled):
        with pytest.raises(ValueError, match="solver='kfac' needs"):
            GaussNewton(model, solver="kfac").step(closure)
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) other than through u"):
        GaussNewton(model, solver="woodbury").step(scaled)
    normed = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 1)).double()
    optimizer = GaussNewton(normed)
    optimizer.step(lambda: PointwiseResidual(normed, lambda u, x: u(x) - 1, points))
    assert optimizer.choice.solver == "nystrom" and "linear layers alone" in optimizer.choice.reason


def test_what_is_not_seen_by_the_layers_is_left_to_others():
    model, points = network(), torch.rand(3, 3, dtype=F64)
    params = list(model.parameters())
    third = PointwiseResidual(model, lambda u, x: directional_derivatives(u, x, ALONG, 3)[3], points)
    assert layer_rows(third, params) is None
    normed = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    assert (
        layer_rows(PointwiseResidual(normed, lambda u, x: laplacian(u, x), points), list(normed.parameters())) is None
    )


class Twice(nn.Module):
    """A layer that is used once with its bias and once without."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(nn.functional.linear(h, self.second.weight)))


def test_a_layer_with_its_bias_and_without_is_left_to_others():
    model = Twice().double()
    residual = PointwiseResidual(model, lambda u, x: laplacian(u, x) - 1, torch.rand(5, 3, dtype=F64))
    optimizer = GaussNewton(model, solver="kfac")
    with pytest.raises(ValueError, match="solver='kfac' needs"):
        optimizer.step(lambda: residual)
    first = GaussNewton(model, solver="nystrom").step(lambda: residual)
    assert first.isfinite()
