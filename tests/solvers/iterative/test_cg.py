"""Conjugate gradients: tolerances kept, progress and negative curvature reported, warm starts used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    CG,
    Dense,
    Diagonal,
    Function,
    Kronecker,
    LinearOperator,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotPositiveDefiniteError,
    StructureError,
)
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import SolverContract
from tests.solvers.problems import normal, positive, with_spectrum


class TestCG(SolverContract):
    tolerance = 1e-9

    def solver(self) -> solvers.Solver:
        return CG(rtol=1e-12)

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        a = positive(5)
        eye = torch.eye(6, dtype=torch.float64)
        kron = reference.kron(positive(2), positive(3))
        return [
            (Dense(a), a),
            (Function(lambda x: x @ a, (5,), symmetric=True, dtype=torch.float64), a),
            (Kronecker(positive(2), positive(3)).shift(0.3), kron + 0.3 * eye),
            (Dense(positive(3, 2)), reference.block_diagonal(*positive(3, 2))),
            (Dense(positive(1)), positive(1)),
        ]


def hard(condition: float = 1e4, n: int = 60) -> Tensor:
    return with_spectrum(torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=torch.float64).tolist())


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-10])
def test_tolerance_is_met_and_not_overdone(rtol: float) -> None:
    matrix, b = hard(), normal(3, 60)
    solution = CG(rtol=rtol).run(Dense(matrix), b)
    residual = torch.linalg.vector_norm(b - solution.x @ matrix, dim=-1)
    torch.testing.assert_close(solution.info.residual, residual)
    assert bool(solution.info.converged.all()) and bool((residual <= rtol * b.norm(dim=-1)).all())
    assert not bool(CG(rtol=rtol, max_steps=solution.info.iterations - 1).run(Dense(matrix), b).info.converged.all())


def test_drift_of_the_recursion_is_mended_by_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, b = hard(10.0, 8), normal(8)
    calls: list[int] = []

    def product(x: Tensor) -> Tensor:
        """The third product is off by a tenth, as if rounded: what the recursion carries on is no residual after it."""
        calls.append(len(calls))
        return (1.1 if len(calls) == 3 else 1.0) * (x @ matrix)

    op = Function(product, (8,), symmetric=True, dtype=torch.float64)
    solution = CG(rtol=1e-9).run(op, b)
    assert bool(solution.info.converged)
    assert float((b - matrix @ solution.x).norm()) <= 1e-9 * float(b.norm())
    monkeypatch.setattr("solvers.iterative.base._RESTARTS", 0)
    calls.clear()
    solution = CG(rtol=1e-9).run(op, b)
    assert not bool(solution.info.converged) and solution.info.iterations < 80, "it went by the true residual"
    torch.testing.assert_close(solution.info.residual, (b - matrix @ solution.x).norm())


def test_absolute_tolerance() -> None:
    matrix, b = hard(), 1e-3 * normal(60)
    info = CG(rtol=0.0, atol=1e-2).run(Dense(matrix), b).info
    assert info.iterations <= 1 and bool(info.converged)


def test_each_right_hand_side_stops_on_its_own() -> None:
    matrix = hard()
    easy = torch.linalg.eigh(matrix).eigenvectors[:, 0]  # one step
    b = torch.stack([easy, normal(60)])
    seen: list[Tensor] = []
    CG(rtol=1e-8).run(Dense(matrix), b, callback=lambda step, x: seen.append(x))
    assert torch.equal(seen[1][0], seen[-1][0]), "a finished right-hand side moved"


def test_preconditioner_and_warm_start_save_steps() -> None:
    scale = torch.logspace(-3, 3, 60, dtype=torch.float64)
    matrix = scale.diag() + 1e-3 * positive(60)
    b = normal(60)
    plain = CG(rtol=1e-8).run(Dense(matrix), b)
    helped = CG(rtol=1e-8, preconditioner=Diagonal(1 / matrix.diagonal())).run(Dense(matrix), b)
    assert helped.info.iterations < plain.info.iterations / 4
    torch.testing.assert_close(helped.x, torch.linalg.solve(matrix, b), rtol=1e-5, atol=1e-5)
    again = CG(rtol=1e-8).run(Dense(matrix), b, x0=helped.x)
    assert again.info.iterations == 0
    assert CG(rtol=1e-8).run(Dense(matrix), 0 * b, x0=helped.x).x.abs().max() == 0


def test_exact_preconditioner_takes_one_step() -> None:
    op = Kronecker(positive(3), positive(4)).shift(0.1)
    assert CG(rtol=1e-10, preconditioner=op.op.inverse(0.1)).run(op, normal(3, 4)).info.iterations == 1  # type: ignore[attr-defined]


def test_progress_rule_is_martens() -> None:
    matrix, b = hard(1e6), normal(60)
    values = [0.0]
    solution = CG(rtol=0.0, stop="progress", max_steps=500).run(
        Dense(matrix), b, callback=lambda step, x: values.append(float(x @ matrix @ x / 2 - b @ x))
    )
    for step in range(1, len(values)):
        window = max(10, step // 10)
        small = step > window and values[step] < 0
        small = small and (values[step] - values[step - window]) / values[step] < window * 5e-4
        assert small == (step == len(values) - 1)
    assert bool(solution.info.converged)


def test_not_converged_is_never_silent() -> None:
    op, b = Dense(hard()), normal(2, 60)
    with pytest.warns(NotConvergedWarning, match=r"CG on Dense\(60x60\) has not converged for 2 of 2 .* in 3 steps"):
        CG(max_steps=3).solve(op, b)
    with pytest.raises(NotConvergedError, match=r"Allow more max_steps"):
        op.inverse(solver=CG(max_steps=3, on_failure="raise")) @ b
    assert not bool(CG(max_steps=3).run(op, b).info.converged.any())


def test_negative_curvature() -> None:
    matrix = with_spectrum([-1.0, 1.0, 2.0, 3.0])
    b = torch.stack([normal(4), torch.linalg.eigh(matrix).eigenvectors[:, 3]])
    with pytest.raises(NotPositiveDefiniteError, match=r"CG met the curvature -.* in step \d: Dense\(4x4\)"):
        CG().solve(Dense(matrix), b)
    solution = CG(negative_curvature="stop").run(Dense(matrix), b)
    info = solution.info
    assert info.negative_curvature is not None and info.direction is not None
    assert info.negative_curvature.tolist() == [True, False] and info.converged.tolist() == [False, True]
    assert float(info.direction[0] @ matrix @ info.direction[0]) < 0
    assert float(info.direction[1].abs().max()) == 0
    with pytest.warns(NotConvergedWarning):
        CG(negative_curvature="stop").solve(Dense(matrix), b)


def test_input_is_checked() -> None:
    op = Dense(positive(4))
    with pytest.raises(ValueError, match=r"b for Dense\(4x4\) has the shape"):
        CG().solve(op, normal(5))
    with pytest.raises(ValueError, match="same batch"):
        CG().solve(op, normal(3, 4), normal(4))
    with pytest.raises(TypeError, match=r"b\.to\(torch.float64\)"):
        CG().solve(op, normal(4).float())
    with pytest.raises(ValueError, match="preconditioner acts on"):
        CG(preconditioner=Dense(positive(3))).solve(op, normal(4))
    with pytest.raises(StructureError, match=r"CG needs a symmetric operator.*symmetric=True"):
        CG().solve(Function(lambda x: x, (4,), dtype=torch.float64), normal(4))
    with pytest.raises(NonFiniteError, match="met NaN or infinity"):
        CG().solve(op, torch.full((4,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="stop is one of residual, progress"):
        CG(stop="never")  # type: ignore[arg-type]
