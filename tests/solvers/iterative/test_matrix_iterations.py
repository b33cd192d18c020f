"""NewtonSchulz, CoupledNewton and the polar factor against eigendecompositions and SVDs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    CoupledNewton,
    Dense,
    LinearOperator,
    NewtonSchulz,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    StructureError,
    polar,
)
from solvers.iterative.newton_schulz import odd_polynomials
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import SolverContract
from tests.solvers.problems import normal, positive, symmetric, with_spectrum


def operators() -> list[tuple[LinearOperator, Tensor]]:
    kron = reference.kron(positive(2), positive(3, seed=1))
    return [
        (Dense(positive(5)), positive(5)),
        (Dense(positive(1)), positive(1)),
        (Dense(positive(3, 2)), reference.block_diagonal(*positive(3, 2))),
        (solvers.Kronecker(positive(2), positive(3, seed=1)), kron),
    ]


class TestNewtonSchulz(SolverContract):
    def solver(self) -> solvers.Solver:
        return NewtonSchulz(on_failure="raise")

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        return operators()


class TestCoupledNewton(SolverContract):
    def solver(self) -> solvers.Solver:
        return CoupledNewton(on_failure="raise")

    def exponents(self) -> tuple[float, ...]:
        return (-1, -1 / 2, -1 / 3, -1 / 4, -1 / 8)

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        return operators()


@pytest.mark.parametrize("solver", [NewtonSchulz(), CoupledNewton()])
def test_ill_conditioned_within_the_residual_it_claims(solver: solvers.MatrixIteration) -> None:
    matrix = with_spectrum(torch.logspace(-6, 0, 20, dtype=torch.float64).tolist())
    solution = solver.run(Dense(matrix), -0.5)
    assert bool(solution.info.converged)
    identity = torch.eye(20, dtype=torch.float64)
    residual = torch.linalg.matrix_norm(solution.x @ solution.x @ matrix - identity) / 20**0.5
    torch.testing.assert_close(solution.info.residual, residual)
    assert float(residual) < 1e-8
    assert solution.info.iterations < 35


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("solver", [NewtonSchulz(on_failure="raise"), CoupledNewton(on_failure="raise")])
def test_badly_scaled(solver: solvers.Solver, scale: float) -> None:
    root = solvers.power(Dense(scale * positive(4)), -0.5, solver).to_dense()
    torch.testing.assert_close(root * scale**0.5, reference.power(positive(4), -0.5))


@pytest.mark.parametrize("solver", [NewtonSchulz(on_failure="raise"), CoupledNewton(on_failure="raise")])
def test_float32_and_half(solver: solvers.Solver) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        root = solvers.power(Dense(positive(4).to(dtype)), -0.5, solver)
        assert root.dtype == torch.float32
        # Backward stable to a few float32 roundings (6e-8) times a condition of 10.
        expected = reference.power(positive(4).to(dtype), -0.5)
        torch.testing.assert_close(root.to_dense().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [NewtonSchulz, CoupledNewton])
def test_failure_is_never_silent(kind: type[NewtonSchulz]) -> None:
    singular = with_spectrum([0.0, 1.0, 2.0])
    with pytest.raises(NotConvergedError, match=r"has not converged on Dense\(3x3\) \*\* -0.5"):
        solvers.power(Dense(singular), -0.5, kind(on_failure="raise"))
    with pytest.warns(NotConvergedWarning, match="in 3 steps"):
        solvers.power(Dense(positive(3)), -0.5, kind(max_steps=3))
    with pytest.raises(NotConvergedError, match="must be positive definite"):
        solvers.power(Dense(symmetric(6)), -0.5, kind(on_failure="raise"))


def test_other_exponents_are_refused() -> None:
    with pytest.raises(StructureError, match=r"raises to -1/p for an integer p, not to -0.3"):
        solvers.power(Dense(positive(3)), -0.3, CoupledNewton())
    with pytest.raises(StructureError, match=r"raises to -1, -0.5, 0.5, not to -0.25"):
        solvers.power(Dense(positive(3)), -0.25, NewtonSchulz())


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (2, 5, 3), (1, 1)])
def test_polar_factor(shape: tuple[int, ...]) -> None:
    matrix = normal(*shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(polar(matrix), u @ vh, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(polar(1e20 * matrix), u @ vh, rtol=1e-10, atol=1e-10)


def test_polar_with_few_steps_is_near_orthogonal() -> None:
    q, _ = torch.linalg.qr(normal(20, 20))
    spectrum = torch.logspace(-2, 0, 20, dtype=torch.float64)
    x = polar((q * spectrum) @ torch.linalg.qr(normal(20, 20, seed=1))[0], steps=5)
    values = torch.linalg.svdvals(x)
    assert 0.8 < float(values.min()) and float(values.max()) < 1.2
    assert polar(normal(8, 5).bfloat16(), steps=5).dtype == torch.bfloat16
    assert float(polar(torch.zeros(3, 2), steps=5).abs().max()) == 0


QUINTIC = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("shape", [(3, 4), (3, 40), (2, 3, 40), (2, 2, 4, 12), (300, 700)])
def test_odd_polynomials_are_those_of_singular_values(shape: tuple[int, ...], steps: int) -> None:
    x = normal(*shape)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    for _ in range(steps):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    # The map is chaotic between 0.7 and 1.2, so that 30 steps multiply rounding errors.
    expected = (u * s.unsqueeze(-2)) @ vh
    torch.testing.assert_close(
        odd_polynomials(x, [QUINTIC] * steps), expected, rtol=0, atol=1e-5 if steps == 30 else 1e-10
    )


@pytest.mark.parametrize("shape", [(48, 200), (8, 64), (64, 300)])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("way", ["quintic", "polar"])
def test_five_steps_in_single_precision(way: str, rank: int, shape: tuple[int, int]) -> None:
    m, n = shape
    x = (normal(m, rank) * torch.logspace(0, -6, rank, dtype=torch.float64)) @ normal(rank, n)
    x = x / torch.linalg.matrix_norm(x)
    run = (
        (lambda y: polar(y, steps=5, together=True))
        if way == "polar"
        else (lambda y: odd_polynomials(y, [QUINTIC] * 5))
    )
    exact, found = (run(y).double() for y in (x, x.float()))
    assert float((found - exact).norm() / exact.norm()) < 1e-3  # what rounding may grow to


def test_polar_of_a_singular_matrix_is_refused() -> None:
    with pytest.raises(NotConvergedError, match=r"away from orthogonal.*Give steps="):
        polar(normal(5, 2) @ normal(2, 5))
    with pytest.raises(NonFiniteError):
        polar(torch.full((2, 2), torch.nan))
