"""``least_squares`` beside SciPy's, on trees, modules and many problems at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

from precond import least_squares

F64 = torch.float64
T = torch.linspace(0, 3, 30, dtype=F64)


def decay(x: torch.Tensor) -> torch.Tensor:
    return x[0] * torch.exp(-x[1] * T) + x[2]


def noisy(seed: int, outliers: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    y = decay(torch.tensor([3.0, 1.5, 0.5], dtype=F64)) + 0.05 * torch.randn(30, generator=generator, dtype=F64)
    y[torch.randperm(30, generator=generator)[:outliers]] += 3.0
    return y


START = torch.tensor([1.0, 1.0, 0.0], dtype=F64)


TIGHT = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "jac": "3-point"}


def reference(y: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda x: (decay(torch.as_tensor(x)) - y).numpy()


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@pytest.mark.parametrize("loss", ["linear", "soft_l1", "huber", "cauchy", "arctan"])
@pytest.mark.parametrize("f_scale", [0.1, 1.0])
def test_robust_losses_reach_scipys_minimum(loss, f_scale):
    y = noisy(0, outliers=4)
    start = torch.tensor([2.8, 1.4, 0.6], dtype=F64)
    ours = least_squares(lambda x: decay(x) - y, start, loss=loss, f_scale=f_scale)
    theirs = optimize.least_squares(reference(y), start.numpy(), loss=loss, f_scale=f_scale, **TIGHT)
    assert ours.success
    assert float(ours.cost) <= theirs.cost * (1 + 1e-9)
    np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-4)
    assert bool(ours.covariance_valid) == (loss == "linear")


@pytest.mark.parametrize(
    ("lower", "upper"), [(-math.inf, [math.inf, 1.0, math.inf]), ([0, 0, 0.6], math.inf), ([3.5, -9, -9], [9, 9, 0.2])]
)
def test_bounds_are_scipys(lower, upper):
    y = noisy(1)
    low, high = (torch.as_tensor(b, dtype=F64).expand(3) for b in (lower, upper))
    start = torch.maximum(torch.minimum(START, high - 0.1 * high.abs().nan_to_num(posinf=1.0)), low + 0.05)
    ours = least_squares(lambda x: decay(x) - y, start, bounds=(lower, upper))
    theirs = optimize.least_squares(reference(y), start.numpy(), bounds=(low.numpy(), high.numpy()), **TIGHT)
    assert ours.success
    assert bool((ours.x >= low).all()) and bool((ours.x <= high).all())
    np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(ours.active_mask, np.where(ours.x == low, -1, np.where(ours.x == high, 1, 0)))
    assert not ours.covariance_valid and bool((ours.stderr[ours.active_mask != 0] == 0).all())


def test_examples_of_scipys_page():
    found = least_squares(rosenbrock, torch.tensor([2.0, 2.0], dtype=F64))
    np.testing.assert_allclose(found.x, [1, 1], atol=1e-12)
    held = least_squares(rosenbrock, torch.tensor([2.0, 2.0], dtype=F64), bounds=([-math.inf, 1.5], math.inf))
    np.testing.assert_allclose(held.x, [1.22437075, 1.5], rtol=1e-6)
    assert held.active_mask.tolist() == [0, -1] and held["cost"] == held.cost


def test_the_covariance_is_the_textbook_one():
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=F64) + 0.1 * X[:, 0].cos()
    found = least_squares(lambda b: X @ b - y, torch.zeros(3, dtype=F64))
    b = torch.linalg.solve(X.T @ X, X.T @ y)
    torch.testing.assert_close(found.x, b, rtol=1e-10, atol=0)
    expected = torch.linalg.inv(X.T @ X) * (X @ b - y).square().sum() / 17
    torch.testing.assert_close(found.covariance, expected, rtol=1e-8, atol=0)
    assert found.covariance_valid and found.rank == 3
    twice = least_squares(lambda b: X @ (b[:3] + b[3:]) - y, torch.zeros(6, dtype=F64))
    assert twice.success and not twice.covariance_valid and twice.rank == 3


def test_many_problems_at_once_are_those_one_by_one():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([3.0, 1.5, 0.5], dtype=F64) * (0.5 + torch.rand(50, 3, generator=generator, dtype=F64))
    y = truth[:, :1] * torch.exp(-truth[:, 1:2] * T) + truth[:, 2:]
    y += 0.01 * torch.randn(50, 30, generator=generator, dtype=F64)

    def residuals(x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] * torch.exp(-x[:, 1:2] * T) + x[:, 2:] - y

    found = least_squares(residuals, START.expand(50, 3), batched=True)
    assert found.success.all() and found.covariance.shape == (50, 3, 3)
    for k in range(0, 50, 7):
        alone = least_squares(lambda x, k=k: decay(x) - y[k], START)
        torch.testing.assert_close(found.x[k], alone.x, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found.stderr[k], alone.stderr, rtol=1e-5, atol=0)


def test_one_broken_problem_of_many_harms_no_other():
    y = torch.stack([noisy(0), noisy(1)])
    y[1, 3] = torch.nan
    found = least_squares(
        lambda x: x[:, :1] * torch.exp(-x[:, 1:2] * T) + x[:, 2:] - y, START.expand(2, 3), batched=True
    )
    assert found.success.tolist() == [True, False] and found.status[1] == -1 and "not finite" in found.message
    torch.testing.assert_close(found.x[0], least_squares(lambda x: decay(x) - y[0], START).x, rtol=1e-9, atol=0)


def test_trees_and_modules():
    y = noisy(2)
    found = least_squares(
        lambda p: p["height"] * torch.exp(-p["rate"] * T) + p["floor"] - y,
        {name: torch.tensor(value, dtype=F64) for name, value in (("height", 1.0), ("rate", 1.0), ("floor", 0.0))},
    )
    plain = least_squares(lambda x: decay(x) - y, START)
    torch.testing.assert_close(
        torch.stack([found.x[k] for k in ("height", "rate", "floor")]), plain.x, rtol=1e-8, atol=0
    )

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.height = nn.Parameter(torch.tensor(1.0, dtype=F64))
            self.rate = nn.Parameter(torch.tensor(1.0, dtype=F64))
            self.floor = nn.Parameter(torch.tensor(0.0, dtype=F64))

    module = Decay()
    fitted = least_squares(lambda m: m.height * torch.exp(-m.rate * T) + m.floor - y, module)
    assert fitted.x is module and module.rate.grad is None
    torch.testing.assert_close(torch.stack([p.detach() for p in module.parameters()]), plain.x, rtol=1e-8, atol=0)


def test_operations_without_forward_derivatives_go_backward():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x.exp())
            return x.exp()

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return g * ctx.saved_tensors[0]

    y = noisy(3)
    found = least_squares(lambda x: x[0] * Exp.apply(-x[1] * T) + x[2] - y, START)
    torch.testing.assert_close(found.x, least_squares(lambda x: decay(x) - y, START).x, rtol=1e-8, atol=0)


def test_units_do_not_matter():
    y = noisy(4)
    units = torch.tensor([1e6, 1e-4, 1e3], dtype=F64)
    plain = least_squares(lambda x: decay(x) - y, START)
    scaled = least_squares(lambda x: decay(x * units) - y, START / units)
    torch.testing.assert_close(scaled.x * units, plain.x, rtol=1e-9, atol=0)
    assert scaled.nfev == plain.nfev


def test_it_says_how_it_ended(capsys):
    y = noisy(5)
    cut = least_squares(lambda x: decay(x) - y, START, max_nfev=3, verbose=2)
    assert not cut.success and cut.status == 0
    shown = capsys.readouterr().out
    assert "step    0" in shown and "maximum number" in shown
    bad = least_squares(lambda x: decay(x) - math.nan, START)
    assert bad.status == -1 and torch.equal(bad.x, START)
    passed = least_squares(lambda x, a, *, b: a * x - b, torch.zeros(2, dtype=F64), args=(2.0,), kwargs={"b": 6.0})
    torch.testing.assert_close(passed.x, torch.full((2,), 3.0, dtype=F64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ftol": -1.0}, ValueError, "ftol is"),
        ({"xtol": float("nan")}, ValueError, "xtol is"),
        ({"gtol": "x"}, TypeError, "gtol is"),
        ({"f_scale": 0.0}, ValueError, "f_scale is"),
        ({"loss": "l1"}, ValueError, "loss is one of"),
        ({"max_nfev": 0}, ValueError, "max_nfev is"),
        ({"x_scale": -1.0}, ValueError, "x_scale is"),
        ({"bounds": (2.0, 3.0)}, ValueError, "outside of the bounds"),
        ({"bounds": (1.0, 1.0)}, ValueError, "below its upper bound"),
        ({"bounds": 1.0}, ValueError, "bounds must be"),
        ({"bounds": ([0.0, 1.0], math.inf)}, ValueError, "bounds of shape"),
        ({"batched": True}, ValueError, "residuals"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, message):
    y = noisy(0)
    with pytest.raises(error, match=message):
        least_squares(lambda x: decay(x) - y, START, **options)
    with pytest.raises(TypeError, match="x0 must hold"):
        least_squares(lambda x: x, [])


@pytest.mark.parametrize(
    ("fun", "start", "message"),
    [
        (lambda x: x.detach() - T[:3], START, "do not depend on the unknowns"),
        (lambda x: x.data - T[:3], START, "do not depend on the unknowns"),
        (lambda x: (x - T[:3]).round().int(), START, "do not depend on the unknowns"),
        (lambda x: x * torch.exp(1j * T[:3]), START, "complex residuals"),
        (lambda x: (x - T[:3]).to_sparse(), START, "sparse"),
        (lambda x: np.exp(x.numpy()), START, "fun returned ndarray"),
        (lambda x: torch.tensor(np.exp(x.numpy())) - 2, START, "by NumPy; .*torch.exp in place of"),
        (lambda x: None, START, "fun returned NoneType"),
        (lambda x: x - 1, START.to(torch.complex128), "torch.complex128"),
        (lambda x: x - 1, START.half(), r"torch.float16.* Give x0.double\(\)"),
        (lambda x: x - 1, START.to_sparse(), r"torch.sparse_coo.* Give x0.to_dense\(\) in"),
        (lambda x: x - 1, START.half().to_sparse(), r"Give x0.to_dense\(\).double\(\) in"),
        (lambda m: m.weight - 1, torch.nn.Linear(2, 1).requires_grad_(False), "all parameters .* requires_grad=False"),
        (lambda x: x - 1, torch.zeros(0), "x0 must hold"),
    ],
)
def test_what_would_be_fitted_wrongly_is_refused(fun, start, message):
    with pytest.raises(TypeError, match=message):
        least_squares(fun, start)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("jac", "3-point", "exact"),
        ("method", "lm", "one method"),
        ("callback", print, "verbose=2"),
        ("sigma", 1, "divide"),
    ],
)
def test_arguments_of_others_are_refused_with_what_to_do(name, value, instead):
    with pytest.raises(TypeError, match=f"takes no {name}: .*{instead}"):
        least_squares(lambda x: x - 1, START, **{name: value})
    with pytest.raises(TypeError, match="everything else by name"):
        least_squares(lambda x: x - 1, START, "2-point")


def test_a_start_with_zero_derivatives_is_a_solution():
    found = least_squares(lambda x: x**2 - 2, torch.zeros(1, dtype=F64))
    assert found.status == 1 and found.x == 0


def test_numbers_of_python_are_fitted_in_double_precision():
    found = least_squares(lambda x: x**2 - 2, 1.0)
    assert found.x.dtype == F64 and found.x.item() == pytest.approx(2**0.5, rel=1e-12)


def test_none_is_no_tolerance_and_bounds_may_be_scipys():
    y = noisy(0)
    limits = optimize.Bounds([0.0, 0.0, 0.0], [2.5, math.inf, 1.0])
    found = least_squares(lambda x: decay(x) - y, START, bounds=limits, ftol=None, xtol=None, gtol=1e-10)
    expected = optimize.least_squares(reference(y), START.numpy(), bounds=limits, **TIGHT)
    assert found.success
    torch.testing.assert_close(found.x, torch.tensor(expected.x), rtol=1e-7, atol=1e-9)


def test_what_fun_writes_into_its_argument_stays_there():
    y, start = noisy(0), START.clone()
    found = least_squares(lambda x: decay(x.add_(0.5)) - y, start)
    torch.testing.assert_close(found.x + 0.5, least_squares(lambda x: decay(x) - y, START).x, rtol=1e-7, atol=1e-9)
    assert torch.equal(start, START)


def test_derivatives_that_are_not_finite_at_the_start_are_reported():
    found = least_squares(lambda x: torch.sqrt((x - START) ** 2) + 1, START)
    assert found.status == -1 and not found.success and found.covariance.isnan().all() and found.nfev == 1
