"""Trace, diagonal, Frobenius norm and quadratic forms: exact where they say so, honest about their error elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Estimate,
    Function,
    Kronecker,
    LinearOperator,
    LowRank,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotSymmetricError,
    Segment,
)
from solvers.estimates.diagonal import DiagonalMethod
from solvers.estimates.trace import TraceMethod
from tests.solvers.counting import Counting, known_by_products
from tests.solvers.problems import normal, positive, symmetric, with_spectrum

TRACE: tuple[TraceMethod, ...] = ("hutchinson", "hutch++", "xtrace")
DIAGONAL: tuple[DiagonalMethod, ...] = ("hutchinson", "xdiag")
RANDOM: list[Callable[..., Estimate]] = [
    *(lambda op, m=m, **kw: solvers.trace(op, m, **kw) for m in TRACE),
    *(lambda op, m=m, **kw: solvers.diagonal(op, m, **kw) for m in DIAGONAL),
    lambda op, samples=30, **kw: solvers.frobenius_norm(op, samples=samples, **kw),
    lambda op, **kw: solvers.logdet(op, 0.0, "slq", **kw),
]
NAMES = [*TRACE, *(f"diagonal {m}" for m in DIAGONAL), "frobenius", "slq"]
each = pytest.mark.parametrize("estimate", RANDOM, ids=NAMES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def structured() -> list[LinearOperator]:
    return [
        Dense(positive(4)),
        Diagonal(normal(3, 2).square() + 1),
        Kronecker(positive(3), positive(2)),
        BlockDiagonal([Dense(positive(3)), Diagonal(normal(2).square() + 1)], [Segment(2, (3,)), Segment(0, (2,))], 5),
        LowRank(normal(2, 5)).shift(0.5),
        solvers.diagonalize(Kronecker(positive(3), positive(2))),
    ]


@pytest.mark.parametrize("op", structured(), ids=repr)
def test_structure_gives_exact_numbers(op: LinearOperator) -> None:
    matrix = op.to_dense()
    expected = {
        "trace": matrix.diagonal().sum(),
        "diagonal": matrix.diagonal().reshape(op.in_shape),
        "frobenius_norm": (matrix**2).sum().sqrt(),
        "logdet": torch.from_numpy(np.asarray(np.linalg.slogdet(matrix.numpy())[1])),
    }
    for name, value in expected.items():
        result = getattr(solvers, name)(op)
        torch.testing.assert_close(result.value, value, rtol=1e-11, atol=1e-11)
        assert result.samples == result.products == 0
        assert torch.equal(result.stderr, torch.zeros_like(value))


def test_as_many_products_as_unknowns_are_exact() -> None:
    matrix = normal(20, 20)
    counting = Counting(lambda x: x @ matrix.mT, 20, symmetric=False)
    result = solvers.trace(counting.op, samples=20)
    torch.testing.assert_close(result.value, matrix.diagonal().sum(), rtol=1e-12, atol=1e-12)
    assert (result.samples, result.products, counting.vectors, float(result.stderr)) == (0, 20, 20, 0)
    torch.testing.assert_close(solvers.diagonal(counting.op).value, matrix.diagonal(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", TRACE)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "decaying"])
def test_trace_is_unbiased(method: TraceMethod, kind: str) -> None:
    n = 60
    matrix = {
        "symmetric": symmetric(n),
        "asymmetric": normal(n, n) + torch.eye(n, dtype=torch.float64),
        "decaying": with_spectrum([1.3**-i for i in range(n)]),
    }[kind]
    op = known_by_products(matrix, symmetric=False)
    runs = [solvers.trace(op, method, samples=24, generator=seeded(seed)) for seed in range(300)]
    values = torch.stack([run.value for run in runs])
    truth = matrix.diagonal().sum()
    assert (values.mean() - truth).abs() < 3.5 * values.std() / 300**0.5
    # The reported errors are of the size of the true ones.
    reported = torch.stack([run.stderr for run in runs]).square().mean().sqrt()
    actual = (values - truth).square().mean().sqrt()
    assert 0.8 < reported / actual < 1.5


@pytest.mark.parametrize("method", DIAGONAL)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "decaying"])
def test_diagonal_is_unbiased(method: DiagonalMethod, kind: str) -> None:
    n = 40
    matrix = {
        "symmetric": symmetric(n),
        "asymmetric": normal(n, n),
        "decaying": with_spectrum([1.3**-i for i in range(n)]),
    }[kind]
    op = known_by_products(matrix, symmetric=False)
    runs = [solvers.diagonal(op, method, samples=16, generator=seeded(seed)) for seed in range(300)]
    values = torch.stack([run.value for run in runs])
    deviation = (values.mean(0) - matrix.diagonal()) / (values.std(0) / 300**0.5)
    assert deviation.square().mean() < 2  # of n numbers that are nearly standard normal
    reported = torch.stack([run.stderr for run in runs]).square().mean().sqrt()
    actual = (values - matrix.diagonal()).square().mean().sqrt()
    assert 0.8 < reported / actual < 1.5


def test_better_methods_are_better() -> None:
    n = 200
    matrix = with_spectrum([1.2**-i for i in range(n)])
    op, truth = known_by_products(matrix), matrix.diagonal().sum()

    def error(method: TraceMethod) -> float:
        runs = [solvers.trace(op, method, samples=60, generator=seeded(seed)).value - truth for seed in range(20)]
        return float(torch.stack(runs).square().mean().sqrt())

    hutchinson, plus_plus, xtrace = map(error, TRACE)
    assert xtrace < plus_plus / 3 < hutchinson / 9


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_caught(method: TraceMethod) -> None:
    root = normal(5, 300, seed=9)
    result = solvers.trace(known_by_products(root.mT @ root), method, samples=30)
    torch.testing.assert_close(result.value, (root**2).sum(), rtol=1e-11, atol=0)
    assert float(result.stderr) < 1e-10 * float(result.value)
    zero = solvers.trace(known_by_products(torch.zeros(50, 50, dtype=torch.float64)), method, samples=30)
    assert float(zero.value) == float(zero.stderr) == 0


def test_low_rank_diagonal_is_caught() -> None:
    root = normal(5, 300, seed=9)
    result = solvers.diagonal(known_by_products(root.mT @ root), "xdiag", samples=30)
    torch.testing.assert_close(result.value, (root**2).sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [*TRACE, None])
@pytest.mark.parametrize("samples", [2, 31, 90])
def test_trace_spends_what_it_reports(method: TraceMethod | None, samples: int) -> None:
    counting = Counting(lambda x: 2 * x + x.roll(1, -1), 100, symmetric=False)
    result = solvers.trace(counting.op, method, samples=samples, batch_size=7)
    assert result.products == counting.vectors <= max(samples, 4)
    assert counting.largest <= 7


@pytest.mark.parametrize("samples", [10, 31])
def test_xdiag_spends_what_it_reports(samples: int) -> None:
    counting = Counting(lambda x: 2 * x, 100)
    result = solvers.diagonal(counting.op, "xdiag", samples=samples, batch_size=7)
    assert result.products == counting.vectors <= samples
    assert counting.largest <= 7


@pytest.mark.parametrize("method", TRACE)
def test_tolerance_is_reached_and_true(method: TraceMethod) -> None:
    matrix = with_spectrum([1 / (1 + i) for i in range(150)])
    op, truth = known_by_products(matrix), float(matrix.diagonal().sum())
    errors, spent = [], set()
    for seed in range(60):
        result = solvers.trace(op, method, samples=10, rtol=0.02, generator=seeded(seed))
        assert float(result.stderr) <= 0.02 * abs(float(result.value))
        errors.append(float(result.value) - truth)
        spent.add(result.samples)
    # What was promised is the error of the whole set of runs; a rule that stops on luck would miss it.
    assert np.sqrt(np.mean(np.square(errors))) < 1.3 * 0.02 * truth
    assert min(spent) >= 10


def test_absolute_tolerance() -> None:
    op = known_by_products(symmetric(120))
    assert float(solvers.trace(op, "hutchinson", samples=10, atol=3.0).stderr) <= 3
    norm = solvers.frobenius_norm(op, samples=10, atol=1.0)
    assert float(norm.stderr) <= 1 and norm.samples > 10
    diagonal = solvers.diagonal(op, "hutchinson", samples=10, atol=1.0, max_samples=2000)
    assert float(diagonal.stderr.square().mean().sqrt()) <= 1


@each
def test_missed_tolerance_is_not_silent(estimate: Callable[..., Estimate]) -> None:
    op = known_by_products(positive(120) + 10 * with_spectrum([1.0] * 60 + [2.0] * 60))
    arguments = {"samples": 10, "rtol": 1e-9, "max_samples": 40}
    with pytest.warns(NotConvergedWarning, match=r"of Function\(120x120\) has the standard error .* max_samples"):
        result = estimate(op, **arguments)
    assert result.samples <= 40 and float(result.stderr.max()) > 0
    with pytest.raises(NotConvergedError, match="times what was asked for"):
        estimate(op, **arguments, on_failure="raise")


@each
def test_own_random_numbers(estimate: Callable[..., Estimate]) -> None:
    op = known_by_products(positive(80))
    before = torch.get_rng_state()
    first, second = estimate(op), estimate(op)
    other = estimate(op, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before), "torch's own random state was touched"
    assert torch.equal(first.value, second.value) and torch.equal(first.stderr, second.stderr)
    assert not torch.equal(first.value, other.value)


@each
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale(estimate: Callable[..., Estimate], scale: float, dtype: torch.dtype) -> None:
    matrix = positive(80).to(dtype)
    plain, scaled = estimate(known_by_products(matrix)), estimate(known_by_products(matrix * scale))
    assert scaled.value.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3  # float32 rounds the entries, and sums of 80 of them
    if estimate is RANDOM[-1]:  # the logarithm adds n log(scale)
        shift = 80 * float(np.log(scale))
        torch.testing.assert_close(scaled.value - shift, plain.value, rtol=tolerance, atol=80 * tolerance)
        return
    torch.testing.assert_close(scaled.value.double() / scale, plain.value.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scaled.stderr.double() / scale, plain.stderr.double(), rtol=tolerance, atol=tolerance)


@each
def test_one_unknown(estimate: Callable[..., Estimate]) -> None:
    result = estimate(known_by_products(torch.tensor([[3.0]], dtype=torch.float64)))
    expected = 3.0 if estimate is not RANDOM[-1] else float(np.log(3.0))
    assert float(result.value) == pytest.approx(expected, rel=1e-14)
    assert float(result.stderr) <= 1e-14


@each
def test_empty(estimate: Callable[..., Estimate]) -> None:
    op = known_by_products(torch.zeros(0, 0, dtype=torch.float64))
    result = estimate(op)
    assert float(result.value.sum()) == float(result.stderr.sum()) == 0
    assert float(solvers.trace(op).value) == 0


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused_by_name(estimate: Callable[..., Estimate], bad: float) -> None:
    matrix = positive(60)
    matrix[3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"Function\(60x60\).*NaN or infinity"):
        estimate(known_by_products(matrix))


def test_non_finite_structure_is_refused_by_name() -> None:
    op = Diagonal(torch.tensor([1.0, float("nan")]))
    for name in ("trace", "diagonal", "frobenius_norm"):
        with pytest.raises(NonFiniteError, match=rf"{name} of Diagonal\(2\) is not finite"):
            getattr(solvers, name)(op)


@pytest.mark.parametrize("name", ["trace", "diagonal", "logdet"])
def test_rectangles_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs a square operator, and Function\(3x2\)"):
        getattr(solvers, name)(known_by_products(normal(3, 2), symmetric=False))


def test_frobenius_norm_of_a_rectangle() -> None:
    matrix = normal(90, 150)
    op = known_by_products(matrix, symmetric=False)
    result = solvers.frobenius_norm(op, rtol=0.01)
    truth = (matrix**2).sum().sqrt()
    assert (result.value - truth).abs() < 3 * result.stderr <= 0.03 * truth
    assert solvers.frobenius_norm(Dense(matrix), samples=20).samples == 20, "an estimate was asked for"


def test_half_precision_is_summed_in_float32() -> None:
    matrix = positive(60).bfloat16()
    result = solvers.trace(known_by_products(matrix), "hutchinson", samples=200)
    assert result.value.dtype == torch.float32
    # Products round to 8 bits, 4e-3; their sum over 60 unknowns must not add to that.
    assert (result.value - matrix.double().diagonal().sum()).abs() < 3 * result.stderr + 4e-3 * result.value


@each
def test_no_graph_is_kept(estimate: Callable[..., Estimate]) -> None:
    matrix = positive(60).requires_grad_()
    result = estimate(known_by_products(matrix))
    assert not result.value.requires_grad and not result.stderr.requires_grad


def test_functions_may_differentiate() -> None:
    x = normal(50).requires_grad_()
    (gradient,) = torch.autograd.grad((x**4).sum() / 12, x, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, x, v, retain_graph=True)[0]

    op = Function(product, (50,), symmetric=True, dtype=torch.float64, batched=False)
    torch.testing.assert_close(solvers.trace(op, "hutchinson", samples=5).value, (x.detach() ** 2).sum())


def test_one_sample_knows_no_error() -> None:
    assert solvers.trace(known_by_products(positive(50)), "hutchinson", samples=1).stderr == float("inf")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    op = known_by_products(positive(50))
    solvers.trace(op, "hutchinson", samples=10, progress=True)
    assert "trace" in capsys.readouterr().err
    solvers.trace(op, "hutchinson", samples=10, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hutch"}, "method is one of hutchinson, hutch\\+\\+, xtrace"),
        ({"samples": 0}, "samples is at least 1"),
        ({"rtol": -1.0}, "rtol is a finite number at least 0"),
        ({"atol": float("nan")}, "atol is a finite number at least 0"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"rtol": 0.1, "max_samples": 5}, "max_samples=5 is below the 100 samples"),
        ({"on_failure": "ignore"}, "on_failure is one of warn, raise"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.trace(known_by_products(positive(200)), **arguments)


def test_repr_shows_the_error() -> None:
    assert repr(solvers.trace(Diagonal(torch.ones(3)))) == "Estimate(3 +- 0, samples=0, products=0)"
    assert repr(solvers.diagonal(Diagonal(torch.ones(3)))) == "Estimate((3,), samples=0, products=0)"


# Quadratic forms


def test_plain_quadratic_form() -> None:
    matrix, x = normal(6, 6), normal(2, 3, 6, seed=1)
    result = solvers.quadratic_form(known_by_products(matrix, symmetric=False), x)
    torch.testing.assert_close(result.value, torch.einsum("...i,ij,...j->...", x, matrix, x))
    assert float(result.stderr.abs().max()) == 0 and result.products == 6


@pytest.mark.parametrize(
    ("function", "numpy_function"),
    [(torch.log, np.log), (torch.sqrt, np.sqrt), (lambda s: 1 / s, lambda s: 1 / s), (torch.exp, np.exp)],
)
def test_quadratic_form_with_a_function(function: Callable, numpy_function: Callable) -> None:
    matrix, x = positive(150), normal(4, 150, seed=1)
    values, vectors = np.linalg.eigh(matrix.numpy())
    expected = ((x.numpy() @ vectors) ** 2 * numpy_function(values)).sum(1)
    result = solvers.quadratic_form(known_by_products(matrix), x, function, rtol=1e-9)
    error = np.abs(result.value.numpy() - expected)
    assert (error <= 1e-9 * np.abs(expected)).all()
    assert (error <= result.stderr.numpy() + 1e-12 * np.abs(expected)).all(), "the error bar is too short"
    assert result.products < 4 * 60


def test_quadratic_form_in_an_eigenvector_ends_at_once() -> None:
    matrix = with_spectrum([1.0, 2.0, 2.0, 5.0])
    _, vectors = torch.linalg.eigh(matrix)
    result = solvers.quadratic_form(known_by_products(matrix), vectors.mT, torch.log)
    torch.testing.assert_close(result.value, torch.tensor([1.0, 2.0, 2.0, 5.0]).double().log(), rtol=0, atol=1e-13)
    zero = solvers.quadratic_form(known_by_products(matrix), torch.zeros(4, dtype=torch.float64), torch.exp)
    assert float(zero.value) == 0


def test_quadratic_form_says_when_it_has_not_converged() -> None:
    matrix = with_spectrum(torch.logspace(-6, 0, 200).tolist())
    with pytest.warns(NotConvergedWarning, match="Allow more steps"):
        result = solvers.quadratic_form(known_by_products(matrix), normal(200), lambda s: 1 / s, steps=20)
    truth = normal(200) @ torch.linalg.solve(matrix, normal(200))
    assert (result.value - truth).abs() < 20 * result.stderr
    with pytest.raises(NotSymmetricError, match="symmetric=True"):
        solvers.quadratic_form(known_by_products(matrix, symmetric=False), normal(200), torch.exp)
