"""Do the self-scaled quasi-Newton methods make the published updates, with steps that meet the Wolfe conditions?"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from precond import SSBFGS, SSBroyden
from precond.closure.line_search import strong_wolfe
from precond.closure.quasi_newton import Secant
from precond.closure.recent_pairs import RecentFamily


def bfgs(H, s, y, b, h, fresh):
    tau = h if fresh else min(1.0, 1 / b)
    n, rho = len(s), 1 / (y @ s)
    V = np.eye(n) - rho * np.outer(y, s)
    return V.T @ H @ V / tau + rho * np.outer(s, s)


def broyden(H, s, y, b, h, fresh):
    # Urbán, Stefanou and Pons, equations 13 to 23; the first update with the scale of the problem
    n, a = len(s), h * b - 1
    lowest = min(1, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((lowest - 1) / a, min(1 / lowest, (1 - b) / b))
    sigma = 1 + a * theta
    power = sigma ** (1 / (1 - n))
    tau = min(1, 1 / b) * min(power, 1 / theta) if theta > 0 else min(min(1, 1 / b) * power, sigma)
    phi = (1 - theta) / (1 + a * theta)
    if fresh:
        tau = h / sigma
    Hy = H @ y
    v = math.sqrt(y @ Hy) * (s / (y @ s) - Hy / (y @ Hy))
    return (H - np.outer(Hy, Hy) / (y @ Hy) + phi * np.outer(v, v)) / tau + np.outer(s, s) / (y @ s)


def loss_of(x):
    """Rosenbrock's function in six variables."""
    return (10 * (x[1:] - x[:-1] ** 2).square() + (1 - x[:-1]).square()).sum()


def start():
    return torch.linspace(-1.2, 0.8, 6, dtype=torch.float64)


def gradient(x):
    return torch.func.grad(loss_of)(torch.as_tensor(x)).numpy()


METHODS = {
    "SSBFGS": SSBFGS,
    "SSBroyden": SSBroyden,
    "SSBFGS, window": lambda p, **o: SSBFGS(p, window=50, **o),
    "SSBroyden, window": lambda p, **o: SSBroyden(p, window=50, **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_updates_are_those_of_the_paper(name):
    p = torch.nn.Parameter(start())
    optimizer = METHODS[name]([p], iterations=1)
    H, update = np.eye(6), broyden if name.startswith("SSBroyden") else bfgs
    shown = []
    for step in range(40):
        before = p.detach().numpy().copy()
        g = gradient(before)
        optimizer.step(lambda: loss_of(p))
        s, direction = p.detach().numpy() - before, -H @ g
        if np.abs(s).max() < 1e-5:  # rounding errors of the moves, seen from outside, begin to count
            break
        alpha = (s @ direction) / (direction @ direction)
        np.testing.assert_allclose(s, alpha * direction, rtol=0, atol=1e-7 * np.abs(s).max(), err_msg=f"step {step}")
        y = gradient(before + s) - g
        b, h = alpha * (-g @ s) / (y @ s), (y @ H @ y) / (y @ s)
        H = update(H, s, y, b, h, step == 0)
        shown.append(b)
        if "inverse" in optimizer.state[p]:
            found = optimizer.state[p]["inverse"].numpy()
            np.testing.assert_allclose(found, H, rtol=0, atol=1e-6 * np.abs(H).max(), err_msg=f"step {step}")
            H = found.copy()  # what differs by rounding alone does not add up
    assert min(shown) < 1 < max(shown)  # both branches of the scaling
    assert loss_of(p).item() < 1e-6


def test_a_window_leaves_the_scales_of_forgotten_pairs_behind():
    p = torch.nn.Parameter(start())
    optimizer = SSBFGS([p], window=3, iterations=1)
    pairs, tau = [], []
    for step in range(12):
        before = p.detach().numpy().copy()
        g = gradient(before)
        H = np.eye(6)
        for i, (s, y) in enumerate(pairs):
            if i < len(pairs) - 3:
                H = H / tau[i]
            else:
                V = np.eye(6) - np.outer(y, s) / (y @ s)
                H = V.T @ H @ V / tau[i] + np.outer(s, s) / (y @ s)
        optimizer.step(lambda: loss_of(p))
        s, direction = p.detach().numpy() - before, -H @ g
        alpha = (s @ direction) / (direction @ direction)
        np.testing.assert_allclose(s, alpha * direction, rtol=0, atol=1e-8 * np.abs(s).max(), err_msg=f"step {step}")
        y = gradient(before + s) - g
        tau.append((y @ y) / (y @ s) if step == 0 else min(1, (y @ s) / (alpha * (-g @ s))))
        pairs.append((s, y))


def test_the_family_from_a_window_is_the_recursion_from_what_is_left(generator):
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian, identity = root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64), np.eye(6)
    signs = iter([1, -1] * 5)

    def scales(b, h, size, fresh):  # a member of the family whose estimate is positive definite
        return 0.7 + 0.1 * b / (1 + b), next(signs) * 0.5 / (h * b - 1 + 1e-3)

    none = torch.zeros(0, 6, dtype=torch.float64)
    inverse = RecentFamily(scales, 3, none, none)
    pairs, members = [], []
    for step in range(9):
        s = torch.randn(6, generator=generator, dtype=torch.float64)
        y = hessian @ s
        H = identity.copy()
        for i, (a, c, tau) in enumerate(pairs):
            if i < len(pairs) - 3:
                H = H / tau
            else:
                Hc = H @ c
                v = a / (c @ a) - Hc / (c @ Hc)
                H = (H - np.outer(Hc, Hc) / (c @ Hc) + members[i] * (c @ Hc) * np.outer(v, v)) / tau
                H = H + np.outer(a, a) / (c @ a)
        found = torch.stack([inverse.apply(e) for e in torch.eye(6, dtype=torch.float64)])
        np.testing.assert_allclose(found.numpy(), H, rtol=1e-8, atol=1e-9 * np.abs(H).max(), err_msg=f"pair {step}")
        assert np.linalg.eigvalsh(H).min() > 0
        slope = float(y @ s)
        b, h = s.numpy() @ np.linalg.solve(H, s.numpy()) / slope, y.numpy() @ H @ y.numpy() / slope
        inverse = inverse.updated(Secant(s, y, slope, b))
        tau, phi = inverse.tau[-1], inverse.phi[-1]
        assert phi == pytest.approx((-1) ** step * 0.5 / (h * b - 1 + 1e-3), rel=1e-6)
        if len(pairs) >= 3:
            members = [max(member, 0.0) for member in members]
        members.append(phi)
        pairs.append((s.numpy(), y.numpy(), tau))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_a_convex_quadratic_takes_as_many_exact_searches_as_it_has_axes(name, size, generator):
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * torch.logspace(0, 2, size, dtype=torch.float64)) @ basis.mT
    p = torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
    value = lambda: 0.5 * p @ matrix @ p  # noqa: E731
    first = value().item()
    METHODS[name]([p], iterations=size, wolfe=(1e-12, 1e-11)).step(value)
    assert value().item() < 1e-16 * first
    few = torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
    if size > 2:
        METHODS[name]([few], iterations=size // 2, wolfe=(1e-12, 1e-11)).step(lambda: 0.5 * few @ matrix @ few)
        assert 0.5 * few @ matrix @ few > 1e-10


@pytest.mark.parametrize("name", METHODS)
def test_many_iterations_in_one_step_are_many_steps_of_one(name):
    p, q = (torch.nn.Parameter(start()) for _ in range(2))
    METHODS[name]([p], iterations=8).step(lambda: loss_of(p))
    one = METHODS[name]([q], iterations=1)
    for _ in range(8):
        one.step(lambda: loss_of(q))
    torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_costs_about_one_evaluation(name):
    p, calls = torch.nn.Parameter(start()), []

    def closure():
        calls.append(1)
        return loss_of(p)

    METHODS[name]([p], iterations=60).step(closure)
    assert loss_of(p).item() < 1e-12
    assert len(calls) < 90


@pytest.mark.parametrize("name", METHODS)
def test_points_may_be_redrawn_between_steps(name, generator):
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = METHODS[name]([p], iterations=3)
    truth = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    for _ in range(12):
        points = torch.randn(64, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 3.0])
        optimizer.step(lambda points=points: (points @ (p - truth)).square().mean())
    torch.testing.assert_close(p.detach(), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_at_the_minimum_nothing_moves_and_a_minimum_above_zero_is_reached(name):
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    optimizer = METHODS[name]([p])
    losses = [float(optimizer.step(lambda: 1e3 + (p - 1).pow(2).sum() + (p - 1).pow(4).sum())) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(p.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
    before = p.detach().clone()
    optimizer.step(lambda: (p - before).square().sum())
    assert torch.equal(p, before)


def test_a_wall_of_infinity_is_stepped_back_from():
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SSBroyden([p])
    optimizer.step(lambda: (0.01 * p - p.log()).sum())  # minimum at 100, undefined below zero
    assert p.item() == pytest.approx(100, rel=1e-6)


def test_parameters_that_come_later_begin_the_estimate_again():
    p, q = torch.nn.Parameter(start()), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    for method in (SSBroyden, SSBFGS, partial(SSBFGS, window=4), partial(SSBroyden, window=4)):
        optimizer = method([p], iterations=2)
        optimizer.step(lambda: loss_of(p))
        optimizer.add_param_group({"params": [q]})
        before = q.detach().clone()
        optimizer.step(lambda: loss_of(p) + (q - 3).square().sum())
        assert not torch.equal(q, before)


def test_refuses_what_is_out_of_range():
    p = torch.nn.Parameter(torch.ones(2))
    for wolfe in ((0.9, 1e-4), (0.0, 0.9), (1e-4, 1.0), 0.5):
        with pytest.raises(ValueError, match="0 < c1 < c2 < 1"):
            SSBroyden([p], wolfe=wolfe)
    with pytest.raises(ValueError, match="iterations"):
        SSBFGS([p], iterations=0)
    with pytest.raises(ValueError, match="window"):
        SSBFGS([p], window=0)
    with pytest.raises(TypeError, match="write 'window' here"):
        SSBFGS([p], history_size=10)
    with pytest.raises(TypeError, match="write 'iterations' here"):
        SSBroyden([p], max_iter=10)


# The line search by itself

FUNCTIONS = {
    # Moré and Thuente (1994), test functions 1, 2 and 3
    "one": lambda t: -t / (t * t + 2),
    "two": lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
    "far": lambda t: (t - 300) ** 2,
    "near": lambda t: (1e6 * t - 1) ** 2,
    "wavy": lambda t: (t - 4) ** 2 + 3 * torch.sin(5 * t),
    "wall": lambda t: -torch.log(3 - t) + (t - 2) ** 4,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("curvature", [1e-2, 0.1, 0.9])
@pytest.mark.parametrize("first", [1e-3, 1e-1, 1.0, 10.0])
def test_the_step_meets_the_strong_wolfe_conditions(name, curvature, first):
    phi = FUNCTIONS[name]

    def evaluate(t):
        x = torch.tensor(t, dtype=torch.float64)
        return float(phi(x)), float(torch.func.grad(phi)(x))

    value, slope = evaluate(0.0)
    sign = 1.0 if slope < 0 else -1.0
    assert sign == 1.0 or name == "wavy"
    along = (lambda t: evaluate(t)) if sign > 0 else (lambda t: (evaluate(-t)[0], -evaluate(-t)[1]))
    step = strong_wolfe(along, value, -abs(slope), first, decrease=1e-4, curvature=curvature, noise=1e-14)
    assert step is not None and step > 0
    there, its = along(step)
    assert there <= value - 1e-4 * step * abs(slope) + 1e-14
    assert abs(its) <= curvature * abs(slope)


def test_without_a_lower_value_there_is_no_step():
    assert strong_wolfe(lambda t: (2.0 + t, -1.0), 1.0, -1.0, 1.0) is None
    assert strong_wolfe(lambda t: (math.nan, math.nan), 1.0, -1.0, 1.0) is None
