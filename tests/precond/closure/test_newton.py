"""Does Newton solve quadratics at once, follow dense algebra, and reject steps that do not lower the loss?"""

from __future__ import annotations

import itertools

import pytest
import torch

from precond.closure.newton import Newton
from precond.step.adapt import LevenbergMarquardt
from solvers import NotPositiveDefiniteError
from tests.precond import references as ref


def quadratic(generator, size=5):
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix, b = (
        root @ root.mT + torch.eye(size, dtype=torch.float64),
        torch.randn(size, generator=generator, dtype=torch.float64),
    )
    return matrix, b


@pytest.mark.parametrize("mode", ["plain", "absolute"])
@pytest.mark.parametrize("maximize", [False, True])
def test_solves_a_quadratic_in_one_step(mode, maximize, generator):
    matrix, b = quadratic(generator)
    first, second = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 3))

    def closure():
        x = torch.cat([first, second])
        return (0.5 * x @ matrix @ x - b @ x) * (-1 if maximize else 1)

    loss = Newton([first, second], mode=mode, maximize=maximize).step(closure)
    assert loss.item() == 0
    solution = torch.cat([first, second]).detach()
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), rtol=1e-10, atol=1e-12)


def test_absolute_equals_dense_algebra():
    def expected(step, theta, g, hessian):
        values, vectors = torch.linalg.eigh(hessian)
        inverse = vectors @ torch.diag(1 / (values.abs() + 0.1)) @ vectors.mT
        return (1 - 0.5 * 0.01) * theta - 0.5 * inverse @ g

    ref.assert_steps_equal(
        lambda model: Newton(model.parameters(), lr=0.5, damping=0.1, mode="absolute", weight_decay=0.01), expected
    )


def test_plain_equals_dense_algebra():
    def expected(step, theta, g, hessian):
        return theta - torch.linalg.solve(hessian + 3.0 * torch.eye(len(theta), dtype=torch.float64), g)

    ref.assert_steps_equal(lambda model: Newton(model.parameters(), damping=3.0), expected)


def test_a_huge_damping_scales_the_gradient():
    def expected(step, theta, g, hessian):
        return theta - 1e12 * g / 1e12

    ref.assert_steps_equal(lambda model: Newton(model.parameters(), lr=1e12, damping=1e12), expected, 3, 1e-9)


def test_adapted_newton_solves_logistic_regression_to_rounding(generator):
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 30.0, 1e3, 1e-2])
    y = torch.randint(0, 3, (60,), generator=generator)
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = Newton(model.parameters(), damping=1e-3, damping_rule=LevenbergMarquardt())

    def closure():
        ridge = sum(p.square().sum() for p in model.parameters())
        return torch.nn.functional.cross_entropy(model(x), y) + 1e-4 * ridge

    losses = []
    for _ in range(25):
        losses.append(optimizer.step(closure).item())
        if max(p.grad.abs().max().item() for p in model.parameters()) < 1e-10:
            break
    assert len(losses) <= 20
    assert max(after - before for before, after in itertools.pairwise(losses)) < 1e-14


def test_rejects_steps_and_raises_the_damping():
    p = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = Newton([p], mode="absolute", damping_rule=LevenbergMarquardt(increase=2.0), damping=1e-3)

    def closure():  # Newton's steps diverge for |x| > 1.09
        return (1 + p.square()).sqrt().sum()

    for _ in range(30):
        optimizer.step(closure)
    assert abs(p.item()) < 1e-6

    start = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    plain = Newton([start], mode="absolute")
    plain.step(lambda: (1 + start.square()).sqrt().sum())
    assert abs(start.item()) > 20  # 3 - 3 * 10 = -27


def test_a_nan_loss_of_a_trial_is_a_rejection():
    p = torch.nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    optimizer = Newton([p], lr=3.0, damping_rule=LevenbergMarquardt(), damping=1e-6)
    for _ in range(20):
        optimizer.step(lambda: (p - p.log()).sum())  # a full step of three Newton's leaves the domain
    assert 0 < p.item() < 2


def test_plain_refuses_an_indefinite_hessian():
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match=r"Use mode='absolute', damping_rule=Leven.*\(\), or"):
        Newton([p]).step(lambda: p[0] ** 2 - p[1] ** 2)
    assert p.tolist() == [1.0, 1.0]


def test_refuses_unknown_modes_and_groups_with_different_damping():
    first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match="mode is one of plain, absolute, not 'inverse'"):
        Newton([first], mode="inverse")
    optimizer = Newton([{"params": [first], "damping": 1.0}, {"params": [second], "damping": 2.0}])
    with pytest.raises(ValueError, match=r"needs one damping, but the groups have \[1.0, 2.0\]"):
        optimizer.step(lambda: first.square().sum() + second.square().sum())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"decrease": 2.0}, "need 0 < decrease <= 1 <= increase; got 2.0"),
        ({"minimum": 0.0}, "need 0 < minimum <= maximum"),
        ({"lower": 0.9}, "need lower <= upper"),
        ({"attempts": 0}, "attempts must be at least 1"),
    ],
)
def test_rule_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**values)
