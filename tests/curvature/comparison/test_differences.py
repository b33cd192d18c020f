"""Are the differences between reports those of the matrices, with errors that hold?"""

from __future__ import annotations

import copy
import functools
import warnings
from math import hypot
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import nn

import curvature
from curvature.comparison.quantities import Measured, Quantity, difference
from curvature.reports import Report
from tests.curvature.problems import PROBLEMS, Problem
from tests.curvature.reports.reference import Truth, truth

LAMBDA = 0.01
EPS = torch.finfo(torch.float64).eps


def moved(problem: Problem) -> Problem:
    """The same problem with other parameters, as after some training."""
    model = copy.deepcopy(problem.model)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return Problem(model, problem.loss_fn, problem.data)


@functools.cache
def known() -> tuple[tuple[Problem, Truth], tuple[Problem, Truth]]:
    first = PROBLEMS["mlp_ce"]()
    other = moved(first)
    return (first, truth(first)), (other, truth(other))


def reported(problem: Problem, **options: Any) -> Report:
    given: dict[str, Any] = {"k": 3, "damping": LAMBDA, "progress": False, **options}
    return curvature.report(problem.model, problem.loss_fn, problem.data, **given)


@functools.cache
def exact() -> curvature.Comparison:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing but the parameters differs
        return curvature.compare(*(reported(problem) for problem, _ in known()))


def one(found: tuple[Quantity, ...]) -> Any:
    (quantity,) = found
    return quantity.differences[1]


def test_differences_of_exact_reports_are_those_of_dense_matrices() -> None:
    (_, a), (_, b) = known()
    found = exact()
    loss = one(found.of("loss"))
    assert loss.value == pytest.approx(b.loss - a.loss, rel=1e-9) and loss.ratio == pytest.approx(b.loss / a.loss)
    norm = one(found.of("gradient norm"))
    assert norm.value == pytest.approx(float(b.gradient.norm() - a.gradient.norm()), rel=1e-9)
    for matrix in ("hessian", "ggn"):
        A, B = a.matrices[matrix], b.matrices[matrix]
        trace = one(found.of("trace", matrix=matrix)[:1])
        assert trace.value == pytest.approx(float(B.trace() - A.trace()), rel=1e-9)
        assert trace.ratio == pytest.approx(float(B.trace() / A.trace()), rel=1e-9)
        assert trace.error == 0 and trace.in_errors is None and trace.differs
        frobenius = one(found.of("Frobenius norm", matrix=matrix))
        assert frobenius.value == pytest.approx(float(B.norm() - A.norm()), rel=1e-9)
        for rank in range(3):
            top = one(found.of(f"eigenvalue {rank + 1}", matrix=matrix))
            gap = torch.linalg.eigvalsh(B)[-1 - rank] - torch.linalg.eigvalsh(A)[-1 - rank]
            assert top.bound and abs(top.value - float(gap)) <= top.error + 1e-12
        for layer, index in a.layers.items():
            part = one(found.of("trace", matrix=matrix, layer=layer))
            assert part.ratio == pytest.approx(float(B[index, index].sum() / A[index, index].sum()), rel=1e-9)
            tops = [torch.linalg.eigvalsh(M[index][:, index])[-1] for M in (A, B)]
            largest = one(found.of("largest eigenvalue", matrix=matrix, layer=layer))
            assert largest.ratio == pytest.approx(float(tops[1] / tops[0]), rel=1e-6)
    dimensions = [(v / (v + LAMBDA)).sum() for v in (t.top("ggn").clamp(min=0) for t in (a, b))]
    assert one(found.of("effective dimension")).value == pytest.approx(float(dimensions[1] - dimensions[0]), rel=1e-7)


def test_a_report_does_not_differ_from_itself_or_from_its_repetition() -> None:
    problem = known()[0][0]
    for options in ({}, {"exact": False, "rtol": 1e-8}):
        found = curvature.compare(*(reported(problem, **options) for _ in range(2)))
        assert {q.differences[1].differs for q in found.quantities if q.differences[1] is not None} <= {False, None}
        assert all(q.differences[1].differs is False for q in found.of("trace") if q.differences[1] is not None)
        assert "differ beyond their errors" in str(found) and "\n* 0 of " in str(found)


@pytest.mark.long
def test_combined_errors_cover_the_true_differences() -> None:
    (first, a), (other, b) = known()
    hits, runs = {"hessian": 0, "ggn": 0}, 40
    options: dict[str, Any] = {"exact": False, "sections": ["trace"]}
    for seed in range(runs):
        pair = (reported(first, seed=seed, **options), reported(other, seed=1000 + seed, **options))
        found = curvature.compare(*pair)
        for matrix in hits:
            d = one(found.of("trace", matrix=matrix)[:1])
            errors = [report.traces[matrix].trace.error for report in pair]
            assert d.error == pytest.approx(hypot(*errors)) and d.error > 0 and not d.bound
            true = float(b.matrices[matrix].trace() - a.matrices[matrix].trace())
            hits[matrix] += abs(d.value - true) <= 2 * d.error
    assert min(hits.values()) >= binom.ppf(1e-4, runs, 0.95)


def test_the_error_of_a_ratio_is_that_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for a, e, b, f in ((5.0, 0.1, 2.0, 0.05), (-3.0, 0.02, 6.0, 0.3)):
        d = difference(Measured(a, e), Measured(b, f), EPS)
        drawn = (b + f * z[1]) / (a + e * z[0])
        assert d.ratio == b / a and d.ratio_error == pytest.approx(float(drawn.std()), rel=0.01)
    # bounds add up: the farthest that a ratio can lie
    d = difference(Measured(5.0, 0.01, bound=True), Measured(2.0, 0.02, bound=True), EPS)
    assert d.error == pytest.approx(0.03)
    assert d.ratio_error == pytest.approx(max(abs(y / x - 0.4) for x in (4.99, 5.01) for y in (1.98, 2.02)), rel=0.01)


@pytest.mark.parametrize(
    ("first", "other", "differs"),
    [
        (Measured(1.0, 0.3), Measured(2.0, 0.4), False),  # two errors, exactly
        (Measured(1.0, 0.3), Measured(2.001, 0.4), True),
        (Measured(1.0, 0.5, bound=True), Measured(2.0, 0.4, bound=True), True),
        (Measured(1.0, 0.6, bound=True), Measured(2.0, 0.4, bound=True), False),
        (Measured(1.0), Measured(1.0 + 1e-15), False),  # rounding
        (Measured(1.0), Measured(1.0 + 1e-9), True),
        (Measured(1.0, 0.1, bound=True, converged=False), Measured(9.0, 0.1, bound=True), None),
    ],
)
def test_what_differs(first: Measured, other: Measured, differs: bool | None) -> None:
    assert difference(first, other, EPS).differs is differs


def test_ratios_to_what_may_be_zero_are_left_out() -> None:
    assert difference(Measured(0.1, 0.1), Measured(5.0, 0.1), EPS).ratio is None
    assert difference(Measured(0.0), Measured(5.0), EPS).ratio is None
    assert difference(Measured(0.3, 0.1), Measured(0.0, 0.1), EPS).ratio == 0.0


def test_eigenvalues_that_have_not_converged_prove_nothing() -> None:
    (first, _), (other, _) = known()
    options: dict[str, Any] = {"products": 40, "exact": False, "rtol": 1e-12, "sections": ["eigenvalues"]}
    found = curvature.compare(*(reported(problem, **options) for problem in (first, other)))
    assert one(found.of("eigenvalue 3", matrix="hessian")).differs is None
    assert "open *" in str(found) and "have not converged" in str(found)


def test_numbers_of_one_report_only_are_not_quantities() -> None:
    (first, _), (other, _) = known()
    found = curvature.compare(reported(first), reported(other, matrix="ggn", sections=["trace"]))
    assert {q.matrix for q in found.quantities} == {None, "ggn"}
    with pytest.raises(KeyError, match=r"there is no 'trace' of hessian in two of the reports; there are loss"):
        found.of("trace", matrix="hessian")


def test_wrapped_modules_are_the_same_layers() -> None:
    assert list(exact().reports[0].layers) == list(exact().reports[1].layers)
    assert isinstance(known()[0][0].model, nn.Module)
