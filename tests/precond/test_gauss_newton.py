"""Do all solvers give the step of the dense normal equations, from residuals of any kind?"""

from __future__ import annotations

import pytest
import torch

from precond.gauss_newton import GaussNewton, PointwiseResidual
from solvers import CG
from tests.precond import references as ref


def residual(model, step):
    x, y = ref.batch(step)
    return (model(x) - y) * (2 / y.numel()) ** 0.5  # half its square is the mean square error


@pytest.mark.parametrize("solver", ["auto", "cholesky", "woodbury", "cg", CG(rtol=1e-12, progress=False)])
def test_equals_the_normal_equations(solver):
    model = ref.SmallModel()
    optimizer = GaussNewton(model.parameters(), lr=0.5, damping=0.1, solver=solver, adapt=False, weight_decay=0.01)
    tolerance = 1e-7 if solver == "cg" else 1e-10
    for step in range(20):
        loss, theta = ref.flat_loss(model, step)
        matrix = ref.gauss_newton_matrix(model, step) + 0.1 * torch.eye(len(theta), dtype=torch.float64)
        expected = (1 - 0.5 * 0.01) * theta - 0.5 * torch.linalg.solve(matrix, torch.func.grad(loss)(theta))
        value = optimizer.step(lambda step=step: residual(model, step))
        assert value.item() == pytest.approx(loss(theta).item(), rel=1e-12)
        ours = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert (ours - expected).abs().max() < tolerance
        assert (ours - theta).abs().max() > 1e-4


@pytest.mark.parametrize("rows", [3, 12])
def test_auto_takes_the_smaller_size_and_both_agree(rows, generator):
    matrix = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(rows, generator=generator, dtype=torch.float64)
    solutions = []
    for solver in ("auto", "cholesky", "woodbury"):
        p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
        GaussNewton([p], damping=1e-3, solver=solver, adapt=False).step(lambda p=p: torch.tanh(matrix @ p) - target)
        solutions.append(p.detach())
    expected = torch.linalg.solve(matrix.mT @ matrix + 1e-3 * torch.eye(6, dtype=torch.float64), matrix.mT @ target)
    for solution in solutions:
        torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-9)


def test_a_huge_damping_scales_the_gradient():
    model = ref.SmallModel()
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    GaussNewton(model.parameters(), lr=1e12, damping=1e12, adapt=False).step(lambda: residual(model, 0))
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(after, before - gradient, rtol=0, atol=1e-10)


def test_several_residuals_are_stacked(generator):
    p = torch.nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    q = torch.nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    GaussNewton([p]).step(lambda: [p.square(), (p.prod() - 1).reshape(1, 1)])
    GaussNewton([q]).step(lambda: torch.cat([q.square(), (q.prod() - 1).reshape(1)]))
    assert torch.equal(p, q)


def test_spring_adds_damped_momentum(generator):
    matrix = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = GaussNewton([p], damping=0.5, spring=0.9, adapt=False)
    theta = old = torch.zeros(5, dtype=torch.float64)
    for step in range(20):
        target = torch.randn(3, generator=generator, dtype=torch.float64)
        optimizer.step(lambda target=target: matrix @ p - target)
        right = matrix.mT @ (matrix @ theta - target) + 0.5 * 0.9 * old
        old = torch.linalg.solve(matrix.mT @ matrix + 0.5 * torch.eye(5, dtype=torch.float64), right)
        theta = theta - old
        torch.testing.assert_close(p.detach(), theta, rtol=0, atol=1e-10, msg=f"step {step}")


def test_points_give_the_jacobian_of_the_tensor():
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()

    points = torch.rand(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def laplacian(u, x):
        return torch.func.hessian(lambda z: u(z)[0])(x).diagonal().sum() - x.sum()

    def as_tensor(model):
        x = points.clone().requires_grad_()
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return 0.5 * (sum(second) - points.sum(1))

    first, second = network(), network()
    pointwise, plain = (GaussNewton(model, damping=1e-2) for model in (first, second))
    for _ in range(5):
        a = pointwise.step(lambda: [PointwiseResidual(first, laplacian, points, weight=0.5)])
        b = plain.step(lambda: as_tensor(second))
        assert a.item() == pytest.approx(b.item(), rel=1e-9)
    assert a.item() < 0.05
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
    matrix_free = GaussNewton(first, solver="cg")
    assert matrix_free.step(lambda: PointwiseResidual(first, laplacian, points)).isfinite()


def test_adapts_and_never_lets_the_loss_rise():
    p = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = GaussNewton([p], damping=1.0)
    losses = []
    for _ in range(60):
        # Rosenbrock's function
        losses.append(optimizer.step(lambda: torch.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])).item())
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(p.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert optimizer.param_groups[0]["damping"] < 1e-3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: 1.0, "not float"),
        (lambda p: [p, p.detach()], "not a tensor without graph"),
        (lambda p: [], "returned no residuals"),
    ],
)
def test_refuses_what_is_no_residual(make, message):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=message):
        GaussNewton([p]).step(lambda: make(p))


def test_refuses_options_out_of_range():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="solver is one of auto, cholesky, woodbury, cg, or a CG; got 'lu'"):
        GaussNewton([p], solver="lu")
    with pytest.raises(ValueError, match=r"spring is the weight of the previous step, in \[0, 1\); got 1"):
        GaussNewton([p], spring=1.0)
    with pytest.raises(ValueError, match="maximize=True has no meaning"):
        GaussNewton([p], maximize=True).step(lambda: p)
