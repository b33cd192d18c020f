"""Do all solvers give the step of the dense normal equations, from residuals of any kind?"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from curvature.residuals.points import PointwiseResidual
from precond import laplacian
from precond.closure import gauss_newton
from precond.closure.gauss_newton import GaussNewton
from precond.closure.solver_choice import cheapest
from solvers import CG, Nystrom
from tests.precond import references as ref


def residual(model, step):
    x, y = ref.batch(step)
    return (model(x) - y) * (2 / y.numel()) ** 0.5  # half its square is the mean square error


@pytest.mark.parametrize(
    "solver",
    ["auto", "cholesky", "woodbury", "cg", CG(rtol=1e-12, progress=False), "nystrom", Nystrom(6)],
    ids=["auto", "cholesky", "woodbury", "cg", "CG", "nystrom", "Nystrom"],
)
def test_equals_the_normal_equations(solver):
    model = ref.SmallModel()
    optimizer = GaussNewton(
        model.parameters(), lr=0.5, damping=0.1, solver=solver, damping_rule=None, scaled=False, weight_decay=0.01
    )
    tolerance = 1e-7 if solver in ("cg", "nystrom") or isinstance(solver, Nystrom) else 1e-10
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
        optimizer = GaussNewton([p], damping=1e-3, solver=solver, damping_rule=None, scaled=False)
        optimizer.step(lambda p=p: torch.tanh(matrix @ p) - target)
        solutions.append(p.detach())
    expected = torch.linalg.solve(matrix.mT @ matrix + 1e-3 * torch.eye(6, dtype=torch.float64), matrix.mT @ target)
    for solution in solutions:
        torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-9)


def test_a_huge_damping_scales_the_gradient():
    model = ref.SmallModel()
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    GaussNewton(model.parameters(), lr=1e12, damping=1e12, damping_rule=None, scaled=False).step(
        lambda: residual(model, 0)
    )
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(after, before - gradient, rtol=0, atol=1e-10)


def test_several_residuals_are_stacked(generator):
    p = torch.nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    q = torch.nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    GaussNewton([p]).step(lambda: [p.square(), (p.prod() - 1).reshape(1, 1)])
    GaussNewton([q]).step(lambda: torch.cat([q.square(), (q.prod() - 1).reshape(1)]))
    assert torch.equal(p, q)


@pytest.mark.parametrize("solver", ["cholesky", "woodbury", CG(rtol=1e-13, progress=False), "nystrom"])
def test_spring_adds_damped_momentum(solver, generator):
    matrix = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = GaussNewton([p], damping=0.5, spring=0.9, damping_rule=None, solver=solver)
    theta = old = torch.zeros(5, dtype=torch.float64)
    for step in range(20):
        target = torch.randn(3, generator=generator, dtype=torch.float64)
        optimizer.step(lambda target=target: matrix @ p - target)
        right = matrix.mT @ (matrix @ theta - target) + 0.5 * 0.9 * old
        old = torch.linalg.solve(matrix.mT @ matrix + 0.5 * torch.eye(5, dtype=torch.float64), right)
        theta = theta - old
        tolerance = 1e-6 if solver == "nystrom" else 1e-10
        torch.testing.assert_close(p.detach(), theta, rtol=0, atol=tolerance, msg=f"step {step}")


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


@pytest.mark.parametrize("rows", [3, 12])
@pytest.mark.parametrize("spring", [0.0, 0.9])
@pytest.mark.parametrize("scaled", [True, "balanced"])
def test_scaled_damps_by_the_largest_diagonal_so_far(scaled, rows, spring, generator):
    weights = torch.randn(rows, 6, generator=generator, dtype=torch.float64)

    def residual(x):
        return torch.tanh(weights @ x) + 0.1 * x[0] ** 2

    p = torch.nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
    optimizer = GaussNewton([p], lr=0.7, damping=0.3, spring=spring, damping_rule=None, scaled=scaled)
    theta, old, largest = p.detach().clone(), torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step in range(10):
        optimizer.step(lambda: residual(p))
        jacobian = torch.func.jacrev(residual)(theta)
        largest = torch.maximum(largest, (jacobian.mT @ jacobian).diagonal())
        squares = largest if scaled is True else (largest * largest.mean()).sqrt()
        right = jacobian.mT @ residual(theta) + 0.3 * spring * squares * old
        old = torch.linalg.solve(jacobian.mT @ jacobian + 0.3 * squares.diag(), right)
        theta = theta - 0.7 * old
        torch.testing.assert_close(p.detach(), theta, rtol=0, atol=1e-10, msg=f"step {step}")


def test_scaled_is_blind_to_the_units_of_a_parameter(generator):
    weights = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(4, generator=generator, dtype=torch.float64)
    units = torch.tensor([1.0, 1e3, 1e-4, 10.0], dtype=torch.float64)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start / units)
    first, second = (GaussNewton([x], damping=0.1, scaled=True) for x in (p, q))
    for _ in range(8):
        a = first.step(lambda: torch.tanh(weights @ p) + 0.5 * p.sin().sum() - 1)
        b = second.step(lambda: torch.tanh(weights @ (units * q)) + 0.5 * (units * q).sin().sum() - 1)
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
    torch.testing.assert_close(p.detach(), (units * q).detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scaled", [True, None])
def test_scaled_is_blind_to_the_units_of_the_loss(scaled, generator):
    weights = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(4, generator=generator, dtype=torch.float64)
    p, q = (torch.nn.Parameter(start.clone()) for _ in range(2))
    first, second = (GaussNewton([x], damping=0.1, scaled=scaled) for x in (p, q))
    for _ in range(8):
        first.step(lambda: torch.tanh(weights @ p) - 0.3)
        second.step(lambda: 2.0**20 * (torch.tanh(weights @ q) - 0.3))
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_acceleration_is_the_second_directional_derivative(generator):
    # Of residuals that are quadratic, the difference quotient is exact.
    weights = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    shift = torch.randn(5, generator=generator, dtype=torch.float64)

    def residual(x):
        return 0.05 * torch.einsum("rij,i,j->r", weights, x, x) + weights[:, 0] @ x - shift

    theta = 0.1 * torch.randn(3, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(theta.clone())
    GaussNewton([p], lr=0.8, damping=10.0, scaled=False).step(lambda: residual(p))
    jacobian = torch.func.jacrev(residual)(theta)
    inverse = torch.linalg.inv(jacobian.mT @ jacobian + 10 * torch.eye(3, dtype=torch.float64))
    move = -0.8 * inverse @ jacobian.mT @ residual(theta)
    bend = -0.5 * inverse @ jacobian.mT @ (0.1 * torch.einsum("rij,i,j->r", weights, move, move))
    assert 1e-4 < bend.norm() / move.norm() < 0.375
    torch.testing.assert_close(p.detach(), theta + move + bend, rtol=0, atol=1e-12)


def naive_curve(residual, theta, move, inverse, chords):
    """A parabola by a difference quotient, and Newton's method for what the linear model promises, with J at theta."""
    jacobian, here = torch.func.jacrev(residual)(theta), residual(theta)
    bent = (residual(theta + 0.1 * move) - here - 0.1 * jacobian @ move) / 0.1**2
    points = [theta + move - inverse @ jacobian.mT @ bent]
    for _ in range(chords):
        lacking = residual(points[-1]) - here - jacobian @ move
        points.append(points[-1] - inverse @ jacobian.mT @ lacking)
    return points, [0.5 * residual(x).square().sum().item() for x in points]


@pytest.mark.parametrize("rows", [2, 5])  # by Woodbury, and by Cholesky
def test_chords_bring_the_residuals_to_what_the_linear_model_promises(rows):
    def residual(x):  # a steep and winding valley
        valley = torch.stack([30 * (x[1] - torch.sin(2 * x[0])), 1 - x[0], 0.1 * (x[2] - x[0]) - 0.2, 0.1 * x[1], x[2]])
        return valley[:rows]

    theta, lam = torch.tensor([-0.3, -0.5, 0.1], dtype=torch.float64), 0.4
    jacobian, here = torch.func.jacrev(residual)(theta), residual(theta)
    inverse = torch.linalg.inv(jacobian.mT @ jacobian + lam * torch.eye(3, dtype=torch.float64))
    move = -inverse @ jacobian.mT @ here
    points, losses = naive_curve(residual, theta, move, inverse, 8)
    before, promised = (0.5 * r.square().sum().item() for r in (here, here + jacobian @ move))
    last = next(k for k, loss in enumerate(losses) if loss - promised <= 0.1 * (before - promised))
    assert last >= 1 and losses[last] < before  # the parabola alone is not enough
    p = torch.nn.Parameter(theta.clone())
    GaussNewton([p], damping=lam, scaled=False).step(lambda: residual(p))
    torch.testing.assert_close(p.detach(), points[last], rtol=0, atol=1e-11)


def test_acceleration_is_left_out_where_the_parabola_is_too_wide():
    # r = x^3 - 8 at 1: with the damping equal to J^2, the move is 7/6 and the bend 0.58 of it.
    p, q = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    for parameter, acceleration in ((p, True), (q, False)):
        optimizer = GaussNewton([parameter], damping=1.0, acceleration=acceleration)
        optimizer.step(lambda x=parameter: x**3 - 8)
    assert p.item() == q.item() == pytest.approx(1 + 7 / 6)


def test_acceleration_follows_a_curved_valley_in_fewer_steps():
    counts = []
    for acceleration in (True, False):
        p = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        optimizer = GaussNewton([p], acceleration=acceleration)
        for _ in range(200):
            # Rosenbrock's function, with a valley ten times steeper
            value = optimizer.step(lambda p=p: torch.stack([100 * (p[1] - p[0] ** 2), 1 - p[0]]))
            if value < 1e-20:
                break
        counts.append(optimizer.steps)
    assert counts[0] < 0.7 * counts[1] < 100


def test_a_step_is_judged_where_it_goes_when_a_group_stands_still():
    for start in torch.linspace(-2, 2, 9, dtype=torch.float64):
        a, b = (torch.nn.Parameter(x * start.new_ones(1)) for x in (start, 0.5 - start))

        def closure(a=a, b=b):
            return torch.cat([3 * (b - a**2), 1 - a, torch.sin(2 * a * b)])

        optimizer = GaussNewton([{"params": [a]}, {"params": [b], "lr": 0.0}])
        before = [0.5 * closure().detach().square().sum().item()]
        for _ in range(6):
            moved = a.item()
            optimizer.step(closure)
            after = 0.5 * closure().detach().square().sum().item()
            if a.item() != moved:
                assert after - before[-1] == pytest.approx(optimizer.judged[1], abs=1e-12)
            assert after <= before[-1]
            before.append(after)
        assert b.item() == 0.5 - start.item()


def test_a_tiny_damping_loses_no_accuracy_in_the_size_of_the_residuals(generator):
    weights = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    target = torch.randn(4, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))
    GaussNewton([p], damping=1e-15, damping_rule=None, scaled=False).step(lambda: weights @ p - target)
    torch.testing.assert_close(p.detach(), torch.linalg.pinv(weights) @ target, rtol=0, atol=1e-13)


def test_a_parameter_without_effect_stays():
    p, unused = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = GaussNewton([p, unused])
    for _ in range(5):
        optimizer.step(lambda: p - 3)
    torch.testing.assert_close(p.detach(), torch.full((2,), 3.0, dtype=torch.float64), rtol=0, atol=1e-6)
    assert unused.tolist() == [1.0, 1.0]


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
    with pytest.raises(
        ValueError, match="solver is one of auto, cholesky, woodbury, kfac, cg, nystrom, a CG or a Nystrom; got 'lu'"
    ):
        GaussNewton([p], solver="lu")
    with pytest.raises(ValueError, match=r"spring is the weight of the previous step, in \[0, 1\); got 1"):
        GaussNewton([p], spring=1.0)
    with pytest.raises(ValueError, match="scaled=True needs the diagonal"):
        GaussNewton([p], solver="cg", scaled=True)
    with pytest.raises(ValueError, match="scaled='balanced' needs the diagonal"):
        GaussNewton([p], solver=Nystrom(3), scaled="balanced")
    with pytest.raises(ValueError, match="scaled is 'balanced', True or False, not 'more'"):
        GaussNewton([p], scaled="more")
    with pytest.raises(ValueError, match="maximize=True has no meaning"):
        GaussNewton([p], maximize=True).step(lambda: p)


def test_the_choice_of_a_solver_has_a_reason():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = GaussNewton([p])
    assert optimizer.choice is None
    optimizer.step(lambda: torch.cat([p - 2, p**2]))
    assert optimizer.choice.solver == "cholesky"
    assert optimizer.choice.reason == "8 residuals, 4 parameters: cholesky takes 149 operations, woodbury 426"
    optimizer.step(lambda: p[:3] - 2)
    assert optimizer.choice.solver == "woodbury"
    assert optimizer.choice.reason == "3 residuals, 4 parameters: woodbury takes 45 operations, cholesky 69"
    asked = GaussNewton([p], solver="woodbury")
    asked.step(lambda: p - 2)
    assert asked.choice.reason == "solver='woodbury' was asked for"


def test_beyond_what_can_be_formed_products_are_used_alone(monkeypatch):
    monkeypatch.setattr(gauss_newton, "cheapest", partial(cheapest, largest=40))
    for scaled in (None, False):
        p = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
        optimizer = GaussNewton([p], scaled=scaled)
        for _ in range(8):
            optimizer.step(lambda p=p: torch.stack([p.sum() - 3, p.prod() - 0.5, *(p[:4] * p[1:5])]))
        assert optimizer.choice.solver == "nystrom" and "more than 40" in optimizer.choice.reason
        assert "scale" not in optimizer.state[p]
    with pytest.raises(ValueError, match="J is too large to be formed"):
        GaussNewton([p], scaled=True).step(lambda: torch.stack([p.sum(), p.prod(), *p]))


def test_a_sketch_preconditions_a_network_of_steep_spectrum():
    def train(solver):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1)).double()
        points = torch.rand(40, 2, dtype=torch.float64)
        optimizer = GaussNewton(model, solver=solver, scaled=False, acceleration=False)

        def residual(u, x):
            return laplacian(u, x) - x.sum()

        for _ in range(6):
            loss = optimizer.step(lambda: PointwiseResidual(model, residual, points, weight=40**-0.5))
        return loss.item()

    exact, inexact = train("cholesky"), train(Nystrom(40))
    assert inexact < 1.5 * exact < 0.02


@pytest.mark.parametrize("solver", ["cholesky", "woodbury", "kfac"])
def test_the_last_layer_alone_is_trained_on_residuals_at_points(solver, monkeypatch):
    monkeypatch.setattr(gauss_newton, "_BY_LAYERS", CG(rtol=1e-13, max_steps=400, progress=False))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    points = torch.rand(6, 2, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = GaussNewton(model[2].parameters(), solver=solver, damping=1e-3, damping_rule=None, scaled=False)
    residual = PointwiseResidual(model, lambda u, x: laplacian(u, x) + u(x) - 1, points)
    rows = torch.func.jacrev(of_last(model, residual), argnums=(0, 1))(before[2], before[3])
    J = torch.cat([row.flatten(1) for row in rows], 1)
    optimizer.step(lambda: residual)
    with torch.no_grad():
        r = of_last(model, residual)(before[2], before[3])
    step = torch.linalg.solve(J.mT @ J + 1e-3 * torch.eye(5, dtype=torch.float64), J.mT @ r)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved[-5:], step.detach(), rtol=1e-8, atol=1e-10)
    assert not moved[:-5].any()


def of_last(model, residual):
    """Residuals at all points by parameters of the last layer, in which they are linear."""

    def function(weight, bias):
        h = [model[:2](x) for x in residual.points]
        twice = torch.func.jacrev(torch.func.jacrev(model[:2]))
        second = [twice(x).diagonal(dim1=-2, dim2=-1).sum(-1) for x in residual.points]
        return torch.cat([weight @ s + weight @ a + bias - 1 for a, s in zip(h, second, strict=True)])

    return function
