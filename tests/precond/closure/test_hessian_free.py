"""Does Hessian-free optimisation solve the damped Gauss-Newton system, and lower the loss?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from curvature.losses import SumOfLosses
from precond.closure.curveball import CurveBall
from precond.closure.hessian_free import HessianFree
from precond.step.graph import CurvedOutput, GaussNewtonMatrix, unflatten
from tests.precond import references as ref


def closure(model, step, loss_fn):
    x, y = ref.batch(step)
    return lambda: loss_fn(model(x), y)


@pytest.mark.parametrize("preconditioner", [False, True])
def test_solves_the_dense_system_and_adapts_by_the_rule(preconditioner):
    model, loss_fn = ref.SmallModel(), nn.MSELoss()
    # Martens' rule would stop earlier; here CG shall solve the system.
    options = {"max_steps": 500, "rtol": 1e-13, "min_progress": 0.0, "preconditioner": preconditioner}
    optimizer = HessianFree(model, loss_fn, damping=0.3, **options)
    damping = 0.3
    for step in range(20):
        loss, theta = ref.flat_loss(model, step)
        g, matrix = torch.func.grad(loss)(theta), ref.gauss_newton_matrix(model, step)
        solution = torch.linalg.solve(matrix + damping * torch.eye(len(theta), dtype=torch.float64), g)
        before = optimizer.step(closure(model, step, loss_fn))
        ours = torch.cat([optimizer.state[p]["solution"].reshape(-1) for p in model.parameters()])
        assert (ours - solution).abs().max() < 1e-9
        after, moved = loss(ref.flat_loss(model, step)[1]), theta - ref.flat_loss(model, step)[1]
        assert after < before
        # The move is a stored iterate, shortened by the line search; it is the solution where that is the best of them.
        ratio = (before - after) / (g @ moved - 0.5 * moved @ matrix @ moved)
        assert ratio > 0
        new = optimizer.param_groups[0]["damping"]
        assert new == pytest.approx(damping * (2 / 3 if ratio > 0.75 else 1.5 if ratio < 0.25 else 1))
        damping = new


def test_solves_linear_least_squares_in_one_step(generator):
    x, y = torch.randn(20, 4, generator=generator).double(), torch.randn(20, 2, generator=generator).double()
    model, loss_fn = nn.Linear(4, 2).double(), nn.MSELoss()
    HessianFree(model, loss_fn, damping=1e-12, rtol=1e-14).step(lambda: loss_fn(model(x), y))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], 1), y).solution
    torch.testing.assert_close(model.weight.detach(), solution[:4].mT, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.bias.detach(), solution[4], rtol=0, atol=1e-7)


def test_products_sum_over_outputs_with_their_weights_in_the_loss(generator):
    model, loss_fn = ref.SmallModel(), nn.CrossEntropyLoss(label_smoothing=0.1)
    x, _ = ref.batch(0)
    labels = torch.randint(4, (12,), generator=generator)
    optimizer = HessianFree(model, loss_fn)

    def both():
        with torch.no_grad():
            loss_fn(model(x), labels)  # a metric, which is no part of the loss
        return 0.3 * loss_fn(model(x), labels) + 2 * loss_fn(input=model(2 * x), target=labels) + model.scale**2

    optimizer._evaluate(both)
    params = list(model.parameters())
    matrix = optimizer.matrix(params)
    sizes = {name: p.shape for name, p in model.named_parameters()}

    def outputs(flat, inputs):
        values = {n: v.reshape(s) for (n, s), v in zip(sizes.items(), unflatten(flat, params).values(), strict=True)}
        return torch.func.functional_call(model, values, (inputs,))

    theta = torch.cat([p.detach().reshape(-1) for p in params])
    expected = 0.0
    for weight, inputs in ((0.3, x), (2, 2 * x)):
        jacobian = torch.func.jacrev(outputs)(theta, inputs)  # (12, 4, P)
        p = torch.softmax(outputs(theta, inputs), 1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = expected + weight / 12 * torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)
    ours = torch.stack([matrix.product(e) for e in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    diagonal = matrix.sampled_diagonal(2000, torch.Generator().manual_seed(0))
    assert (diagonal - expected.diagonal()).abs().max() < 0.15 * expected.diagonal().max()


TO_THE_END = {"max_steps": 500, "rtol": 1e-13, "min_progress": 0.0, "preconditioner": False}


@pytest.mark.parametrize("method", [partial(HessianFree, **TO_THE_END), CurveBall], ids=["HessianFree", "CurveBall"])
def test_a_sum_of_losses_on_two_outputs_is_the_loss_on_both(method):
    """Means over equally many numbers: the sum of the two is twice the mean over all."""
    both, halves = ref.SmallModel(), ref.SmallModel()
    whole = nn.MSELoss()
    parts = SumOfLosses({key: (1.0, nn.MSELoss()) for key in (0, 1)})
    first, second = method(both, whole), method(halves, parts)
    for step in range(3):
        x, y = ref.batch(step)
        first.step(lambda x=x, y=y: 2 * whole(both(x), y))
        second.step(lambda x=x, y=y: parts(outputs=halves(x).chunk(2, 1), targets=y.chunk(2, 1)))
    for p, q in zip(both.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_an_output_that_a_parameter_does_not_reach_has_zero_columns():
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    matrix = GaussNewtonMatrix([CurvedOutput(a * 3, lambda x: x)], [a, b])
    assert matrix.product(torch.ones(4, dtype=torch.float64)).tolist() == [9.0, 9.0, 0.0, 0.0]


@pytest.mark.parametrize("maximize", [False, True])
def test_curveball_equals_dense_algebra(maximize):
    model, loss_fn = ref.SmallModel(), nn.MSELoss()
    sign = -1 if maximize else 1
    optimizer = CurveBall(model, loss_fn, damping=0.5, maximize=maximize)
    z = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    damping = 0.5
    for step in range(20):
        loss, theta = ref.flat_loss(model, step)
        g = torch.func.grad(loss)(theta)
        matrix = ref.gauss_newton_matrix(model, step) + damping * torch.eye(len(theta), dtype=torch.float64)
        slope = matrix @ z + g
        # rho and beta minimise the model of rho z - beta slope
        basis = torch.stack([z, -slope])
        a, b = basis @ matrix @ basis.mT, -basis @ g
        rho, beta = (0.0, b[1] / a[1, 1]) if step == 0 else torch.linalg.solve(a, b)
        z = rho * z - beta * slope
        x, y = ref.batch(step)
        before = optimizer.step(lambda x=x, y=y: sign * loss_fn(model(x), y))
        after = ref.flat_loss(model, step)[1]
        assert (after - theta - z).abs().max() < 1e-10
        ratio = (sign * before - loss(after)) / -(g @ z + 0.5 * z @ matrix @ z)
        if step % 5 == 0:
            damping *= 0.999**5 if ratio > 1.5 else 0.999**-5 if ratio < 0.5 else 1
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping)
    assert damping != 0.5


@pytest.mark.parametrize("method", [HessianFree, CurveBall])
def test_refuses(method):
    model = nn.Linear(2, 2)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    with pytest.raises(TypeError, match="needs the loss module that the closure calls"):
        method(model, torch.nn.functional.mse_loss)
    with pytest.raises(RuntimeError, match="did not call the loss module given to the optimizer"):
        method(model, nn.MSELoss()).step(lambda: (model(x) - y).square().mean())
    unreduced = nn.MSELoss(reduction="none")
    with pytest.raises(ValueError, match=r"one value per term, .* needs reduction='mean' or 'sum'"):
        method(model, unreduced).step(lambda: unreduced(model(x), y).sum())
    loss_fn = nn.MSELoss()
    with pytest.raises(ValueError, match="holds a negative multiple of MSELoss"):
        method(model, loss_fn).step(lambda: -loss_fn(model(x), y))
    assert not loss_fn._forward_hooks


def test_refuses_options_out_of_range():
    with pytest.raises(ValueError, match=r"warm_start is the share of the previous solution, in \[0, 1\]; got 2"):
        HessianFree(nn.Linear(1, 1), nn.MSELoss(), warm_start=2.0)
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        HessianFree(nn.Linear(1, 1), nn.MSELoss(), samples=0)
