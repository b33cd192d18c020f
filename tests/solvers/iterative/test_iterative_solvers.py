"""MINRES, LSMR, Neumann and Nystrom: their problems, their tolerances, their reports."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import solvers
from solvers import (
    CG,
    LSMR,
    MINRES,
    Dense,
    Diagonal,
    Function,
    Kronecker,
    LinearOperator,
    LowRank,
    Neumann,
    NotConvergedError,
    NotConvergedWarning,
    NotPositiveDefiniteError,
    Nystrom,
    StructureError,
)
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import SolverContract
from tests.solvers.problems import normal, positive, symmetric, with_spectrum


def operators() -> list[tuple[LinearOperator, Tensor]]:
    a = positive(5)
    kron = reference.kron(positive(2), positive(3)) + 0.3 * torch.eye(6, dtype=torch.float64)
    return [
        (Dense(a), a),
        (Function(lambda x: x @ a, (5,), symmetric=True, dtype=torch.float64), a),
        (Kronecker(positive(2), positive(3)).shift(0.3), kron),
        (Dense(positive(3, 2)), reference.block_diagonal(*positive(3, 2))),
        (Dense(positive(1)), positive(1)),
    ]


class TestMINRES(SolverContract):
    def solver(self) -> solvers.Solver:
        return MINRES(rtol=1e-12, on_failure="raise")

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        return operators()


class TestLSMR(SolverContract):
    def solver(self) -> solvers.Solver:
        return LSMR(rtol=1e-12, on_failure="raise")

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        return [(op, matrix) for op, matrix in operators() if not isinstance(op, Function)]

    def test_zero_operator_is_refused(self) -> None:
        assert float(LSMR().solve(Dense(torch.zeros(3, 2)), torch.ones(3)).abs().max()) == 0  # least norm


class TestNeumann(SolverContract):
    def solver(self) -> solvers.Solver:
        return Neumann(rtol=1e-12, max_steps=2000, on_failure="raise")

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        return operators()


class TestNystromOfFullRank(SolverContract):
    def solver(self) -> solvers.Solver:
        return Nystrom(20, rtol=1e-10, on_failure="raise")

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        eye = torch.eye(6, dtype=torch.float64)
        root = normal(3, 6)
        return [
            (Dense(positive(6)).shift(0.1), positive(6) + 0.1 * eye),
            (Kronecker(positive(2), positive(3)).shift(0.3), reference.kron(positive(2), positive(3)) + 0.3 * eye),
            (LowRank(root).shift(0.5), root.mT @ root + 0.5 * eye),
        ]

    def test_rectangles_are_refused(self) -> None:
        with pytest.raises(StructureError, match="needs the shift apart"):
            Nystrom(2).solve(Dense(positive(3)), normal(3))


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("kind", [MINRES, LSMR, CG])
def test_tolerance_is_met_and_not_overdone(kind: Callable[..., solvers.IterativeSolver], rtol: float) -> None:
    matrix = with_spectrum(torch.logspace(0, 2, 30, dtype=torch.float64).tolist())
    b = normal(3, 30)
    solution = kind(rtol=rtol).run(Dense(matrix), b)
    assert bool((solution.info.residual <= solution.info.tolerance).all()) and bool(solution.info.converged.all())
    fewer = kind(rtol=rtol, max_steps=solution.info.iterations - 1).run(Dense(matrix), b)
    assert not bool(fewer.info.converged.all())
    r = b - solution.x @ matrix
    expected = torch.linalg.vector_norm(r @ matrix if kind is LSMR else r, dim=-1)
    torch.testing.assert_close(solution.info.residual, expected)


def test_minres_solves_indefinite_systems_and_singular_consistent_ones() -> None:
    matrix = symmetric(12)
    b = normal(4, 12)
    torch.testing.assert_close(MINRES(rtol=1e-12).solve(Dense(matrix), b) @ matrix, b)
    singular = with_spectrum([0.0, -1.0, 2.0, 5.0])
    b = normal(4) @ singular
    torch.testing.assert_close(MINRES(rtol=1e-10).solve(Dense(singular), b) @ singular, b)


def test_minres_residuals_are_minimal() -> None:
    matrix, b = symmetric(12), normal(12)
    seen: list[Tensor] = []
    MINRES(rtol=1e-12).run(Dense(matrix), b, callback=lambda step, x: seen.append(x))
    krylov = [b]
    for step, x in enumerate(seen[:6]):
        if step:
            krylov.append(matrix @ krylov[-1])
        basis = np.linalg.qr(torch.stack(krylov, 1).numpy())[0]
        best = np.linalg.lstsq(matrix.numpy() @ basis, b.numpy(), rcond=None)[0]
        smallest = np.linalg.norm(b.numpy() - matrix.numpy() @ basis @ best)
        np.testing.assert_allclose(float((b - matrix @ x).norm()), smallest, rtol=1e-8)


def test_minres_with_preconditioner_and_warm_start() -> None:
    scale = torch.logspace(-2, 2, 40, dtype=torch.float64) * (-1) ** torch.arange(40)
    matrix = scale.diag() + 1e-2 * positive(40)
    b = normal(40)
    plain = MINRES(rtol=1e-8).run(Dense(matrix), b)
    helped = MINRES(rtol=1e-8, preconditioner=Diagonal(1 / scale.abs())).run(Dense(matrix), b)
    assert helped.info.iterations < plain.info.iterations / 2
    torch.testing.assert_close(matrix @ helped.x, b, rtol=1e-6, atol=1e-6)
    assert MINRES(rtol=1e-7).run(Dense(matrix), b, x0=helped.x).info.iterations == 0


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_lsmr_is_least_squares_of_least_norm(shape: tuple[int, int], damp: float) -> None:
    matrix, b = normal(*shape), normal(2, shape[0])
    op = Dense(matrix)
    x = LSMR(rtol=1e-13, damp=damp).solve(op, b)
    rows = torch.cat([matrix, damp * torch.eye(shape[1], dtype=torch.float64)])
    sides = torch.cat([b, torch.zeros(2, shape[1], dtype=torch.float64)], 1)
    expected = np.linalg.lstsq(rows.numpy(), sides.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(x, expected, atol=1e-10)
    if damp == 0:
        torch.testing.assert_close(solvers.solve(op, b, LSMR(rtol=1e-13)), x)
    warm = LSMR(rtol=1e-12, damp=damp).run(op, b, x0=x)
    assert warm.info.iterations == 0


def test_lsmr_takes_the_steps_of_scipy() -> None:
    matrix, b = normal(40, 30), normal(40)
    ours = LSMR(rtol=0.0, max_steps=7).run(Dense(matrix), b)
    theirs = scipy.sparse.linalg.lsmr(matrix.numpy(), b.numpy(), maxiter=7, atol=0, btol=0, conlim=0)
    np.testing.assert_allclose(ours.x, theirs[0], rtol=1e-8)
    np.testing.assert_allclose(float(ours.info.residual), theirs[4], rtol=1e-6)


def test_lsmr_inverts_asymmetric_matrices() -> None:
    matrix = normal(5, 5) + 3 * torch.eye(5, dtype=torch.float64)
    inverse = Dense(matrix).inverse(solver=LSMR(rtol=1e-13))
    torch.testing.assert_close(inverse.to_dense() @ matrix, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(inverse.adjoint().to_dense(), inverse.to_dense().mT)


@pytest.mark.parametrize("solver", [MINRES(max_steps=2), LSMR(max_steps=2), Neumann(max_steps=2), Nystrom(2)])
def test_not_converged_is_never_silent(solver: solvers.IterativeSolver) -> None:
    op, b = Dense(positive(20)).shift(0.1), normal(20)
    name = type(solver).__name__
    with pytest.warns(NotConvergedWarning, match=rf"{name} on Shifted\(Dense\(20x20\), 0.1\) has not converged"):
        solver.solve(op, b)
    with pytest.warns(NotConvergedWarning):
        op.inverse(solver=solver) @ b


def test_neumann_is_its_series_and_reports_divergence() -> None:
    matrix, b = positive(6), normal(6)
    x = Neumann(rtol=0.0, scale=0.1, max_steps=4).run(Dense(matrix), b).x
    term, expected = 0.1 * b, torch.zeros_like(b)
    for _ in range(4):
        expected, term = expected + term, term - 0.1 * matrix @ term
    torch.testing.assert_close(x, expected)
    with pytest.raises(NotConvergedError, match="Neumann"):
        Neumann(scale=10.0, on_failure="raise").solve(Dense(matrix), b)
    preconditioned = Neumann(rtol=1e-10, preconditioner=Dense(matrix).inverse()).run(Dense(matrix), b)
    assert preconditioned.info.iterations <= 2


def test_nystrom_preconditioner_saves_steps() -> None:
    spectrum = (1e4 * 0.5 ** torch.arange(80, dtype=torch.float64)).tolist()
    op = Dense(with_spectrum(spectrum)).shift(1e-2)
    b = normal(2, 80)
    plain = CG(rtol=1e-8).run(op, b)
    helped = CG(rtol=1e-8, preconditioner=Nystrom(20).precondition(op)).run(op, b)
    assert bool(helped.info.converged.all()) and helped.info.iterations < plain.info.iterations / 3
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-4, atol=1e-4)


def test_nystrom_approximation_is_below_and_near() -> None:
    matrix = with_spectrum((0.1 ** torch.arange(12, dtype=torch.float64)).tolist())
    approximation = Nystrom(6).approximate(Dense(matrix)).to_dense()
    gap = torch.linalg.eigvalsh(matrix - approximation)
    assert float(gap.min()) > -1e-12 and float(gap.max()) < 1e-3
    low_rank = normal(3, 8)
    torch.testing.assert_close(Nystrom(5).approximate(LowRank(low_rank)).to_dense(), low_rank.mT @ low_rank)
    with pytest.raises(NotPositiveDefiniteError, match="Nystrom needs a positive semi-definite operator"):
        Nystrom(3).approximate(Dense(-positive(4)))
    with pytest.raises(ValueError, match="rank is at least 1"):
        Nystrom(0)


def test_nystrom_draws_from_its_generator() -> None:
    op = Dense(positive(10))
    state = torch.get_rng_state()
    first = Nystrom(3, generator=torch.Generator().manual_seed(1)).approximate(op).to_dense()
    second = Nystrom(3, generator=torch.Generator().manual_seed(1)).approximate(op).to_dense()
    other = Nystrom(3, generator=torch.Generator().manual_seed(2)).approximate(op).to_dense()
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
