"""Fallback takes the first that succeeds; the ladder goes rung by rung and says when it is inexact."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    Cholesky,
    Dense,
    Diagonal,
    Eigh,
    Fallback,
    InexactWarning,
    InFloat64,
    Jitter,
    Kronecker,
    LinearOperator,
    NonFiniteError,
    NotPositiveDefiniteError,
    Previous,
    SolverError,
    ladder,
)
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import SolverContract
from tests.solvers.direct.test_direct_solvers import structures
from tests.solvers.problems import positive, symmetric, with_spectrum


class TestFallback(SolverContract):
    tolerance = 1e-12

    def solver(self) -> solvers.Solver:
        return Fallback(Cholesky(), Eigh())

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        kron = reference.kron(positive(2), positive(3)) + 0.3 * torch.eye(6, dtype=torch.float64)
        return [*structures(), (Kronecker(positive(2), positive(3)).shift(0.3), kron)]


class TestInFloat64(TestFallback):
    def solver(self) -> solvers.Solver:
        return InFloat64(Eigh())


class TestLadder(TestFallback):
    def solver(self) -> solvers.Solver:
        return ladder()

    def exponents(self) -> tuple[float, ...]:
        return (-1,)


@dataclass(frozen=True)
class Counting(solvers.Solver):
    calls: list[str]
    exponents = None
    needs = (Dense,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        self.calls.append(repr(op))
        return op


def test_the_second_is_asked_only_for_what_the_first_refuses(caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting([])
    op = Kronecker(positive(2), symmetric(3))
    with caplog.at_level(logging.INFO, "solvers.fallback"):
        result = solvers.power(op, -1, Fallback(Cholesky(), counting))
    assert counting.calls == ["Dense(3x3)"]
    assert isinstance(result, Kronecker)
    torch.testing.assert_close(result.factors[0].to_dense(), reference.power(positive(2), -1))
    assert "Cholesky(explicit=True) failed: Cholesky cannot invert Dense(3x3)" in caplog.text


def test_all_failures_are_listed() -> None:
    with pytest.raises(
        NotPositiveDefiniteError, match=r"No solver of 2 succeeded:\n\(a\) Cholesky.*\n\(b\) .* no real power"
    ):
        solvers.power(Dense(-positive(3)), -1, Fallback(Cholesky(), _RootOfInverse()))
    with pytest.raises(ValueError, match="at least one"):
        Fallback()


@dataclass(frozen=True)
class _RootOfInverse(solvers.Solver):
    exponents = None
    needs = (Dense,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        return Eigh().power(op, -0.5)


def test_float64_saves_what_float32_cannot() -> None:
    # The exact second pivot is 7e-7, and the float32 spacing of 28.1..., from which it is subtracted, is 2e-6: one
    # machine finds a negative pivot, another one that is five times too large.
    matrix = torch.tensor([[9.0, 15.916031837463379], [15.916031837463379, 28.14667510986328]])
    exact = reference.power(matrix, -1)
    assert bool((torch.linalg.eigvalsh(matrix.double()) > 0).all())

    def error(solver: solvers.Solver) -> float:
        inverse = solvers.power(Dense(matrix), -1, solver)
        assert inverse.dtype == torch.float32
        return float((inverse.to_dense().double() - exact).abs().max() / exact.abs().max())

    assert error(InFloat64(Cholesky())) < 1e-6
    with suppress(NotPositiveDefiniteError):
        assert error(Cholesky()) > 0.1


def test_jitter_is_the_smallest_that_works_and_warns() -> None:
    matrix = with_spectrum([-5e-6, 1.0, 2.0])
    with pytest.raises(NotPositiveDefiniteError):
        solvers.power(Dense(matrix), -1, Cholesky())
    with pytest.warns(InexactWarning, match=r"Dense\(3x3\) \*\* -1 succeeded only with .* of its mean diagonal"):
        inverse = solvers.power(Dense(matrix), -1, Jitter(Cholesky(), smallest=1e-6))
    shift = 1e-5 * matrix.diagonal().abs().mean()  # 1e-6 is not enough
    expected = reference.power(matrix + shift * torch.eye(3, dtype=torch.float64), -1)
    torch.testing.assert_close(inverse.to_dense(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotPositiveDefiniteError):
        solvers.power(Dense(-matrix), -1, Jitter(Cholesky()))


def test_the_last_rung_keeps_the_previous_result() -> None:
    good = solvers.power(Dense(positive(3)), -1, ladder())
    bad = Dense(torch.full((3, 3), torch.nan, dtype=torch.float64))
    with pytest.warns(InexactWarning, match=r"the earlier result is kept"):
        assert solvers.power(bad, -1, ladder(), previous=good) is good
    with pytest.raises(NonFiniteError, match=r"\(e\) There is no earlier power of Dense\(3x3\) to keep"):
        solvers.power(bad, -1, ladder())
    with pytest.raises(SolverError, match="no earlier power"):
        solvers.power(Diagonal(torch.ones(2)), -1, Previous())


def test_the_ladder_clamps_an_indefinite_matrix() -> None:
    matrix = with_spectrum([-1.0, 1.0, 2.0])
    inverse = solvers.power(Dense(matrix), -1, ladder())
    torch.testing.assert_close(inverse.to_dense(), solvers.power(Dense(matrix), -1, Eigh("clamped")).to_dense())
