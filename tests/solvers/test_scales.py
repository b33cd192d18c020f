"""Numbers whose squares leave the floating range: the right answer, or a word; never zero as converged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import solvers
from solvers import CG, LSMR, MINRES, Dense, Function, Neumann, NonFiniteError, NotConvergedWarning, Nystrom
from tests.solvers.counting import known_by_products
from tests.solvers.problems import normal, positive

N = 12
SCALES = [(torch.float32, s) for s in (1e-36, 1e-30, 1e-20, 1e20, 1e30, 1e36)] + [
    (torch.float64, s) for s in (1e-300, 1e-160, 1e160, 1e300)
]


def operator(solver: solvers.IterativeSolver, matrix: Tensor, scale: float) -> solvers.LinearOperator:
    scaled = matrix * scale
    if not isinstance(solver, Nystrom):
        return Dense(scaled)
    rest = scaled - 0.25 * scale * torch.eye(N, dtype=matrix.dtype)
    return Function(lambda x: x @ rest, (N,), symmetric=True, dtype=matrix.dtype).shift(0.25 * scale)


@pytest.mark.parametrize("dtype_and_scale", SCALES, ids=str)
@pytest.mark.parametrize("kind", [CG, MINRES, LSMR, Neumann, Nystrom])
def test_solutions_of_any_scale(kind: Any, dtype_and_scale: tuple[torch.dtype, float]) -> None:
    dtype, scale = dtype_and_scale
    solver = Nystrom(N) if kind is Nystrom else kind(max_steps=500)
    matrix, b = positive(N).to(dtype), normal(2, N).to(dtype)
    exact = torch.linalg.solve(matrix.double(), b.mT.double()).mT
    finfo = torch.finfo(dtype)
    for of_b in (1.0, scale, scale**0.5, 1 / scale):
        size = of_b / scale
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                x = solvers.solve(operator(solver, matrix, scale), b * of_b, solver)
            except NonFiniteError:
                assert not size < 1e-2 * finfo.max  # the solution overflows
                continue
        if 1e3 * finfo.tiny < size < 1e-3 * finfo.max:
            assert not caught
            torch.testing.assert_close(x.double() / size, exact, rtol=0, atol=1e-4)
        else:
            told = [w for w in caught if issubclass(w.category, NotConvergedWarning)]
            assert told or bool((x != 0).any())


def test_a_solution_that_underflows_is_no_zero_that_has_converged() -> None:
    with pytest.warns(NotConvergedWarning, match="2 of 2 right-hand sides"):
        solvers.solve(Dense(1e30 * positive(3).float()), 1e-30 * torch.ones(2, 3), CG())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_arguments_keep_their_units(scale: float) -> None:
    matrix, b = positive(N).float(), normal(N).float()
    op, eye = Dense(scale * matrix), torch.eye(N, dtype=torch.float64)
    exact = matrix.double()
    damped = torch.linalg.solve(exact @ exact + 0.09 * eye, exact @ b.double())
    found = solvers.solve(op, b, LSMR(damp=0.3 * scale)).double() * scale
    torch.testing.assert_close(found, damped, rtol=0, atol=1e-5)
    plain = torch.linalg.solve(exact, b.double())
    start = (plain / scale).float()
    info = CG(rtol=1e-4).run(op, b, start).info
    assert bool(info.converged) and info.iterations <= 1  # a warm start is in the units of x
    stepped = solvers.solve(op, b, Neumann(scale=0.2 / scale, max_steps=500)).double() * scale
    torch.testing.assert_close(stepped, plain, rtol=0, atol=1e-4)
    near = Dense((torch.linalg.inv(exact) / scale).float(), is_gram=True)
    for solver in (CG(preconditioner=near), MINRES(preconditioner=near), Neumann(preconditioner=near, scale=0.9)):
        run = solver.run(op, b)
        assert run.info.iterations <= 12
        torch.testing.assert_close(run.x.double() * scale, plain, rtol=0, atol=1e-4)
    seen: list[Tensor] = []
    CG().run(op, b, callback=lambda _, x: seen.append(x))
    torch.testing.assert_close(seen[-1].double() * scale, plain, rtol=0, atol=1e-4)
    residual = CG(max_steps=2).run(op, b).info
    assert 0 < float(residual.residual) < 10 * float(b.norm()) and not bool(residual.converged)


def test_ordinary_numbers_are_not_touched() -> None:
    # By powers of two, scaled and plain solves agree to the last bit; ordinary ones take no further product.
    matrix, b = positive(N), normal(N)
    products = [0]

    def product(x: Tensor) -> Tensor:
        products[0] += len(x)
        return x @ matrix

    op = Function(product, (N,), symmetric=True, dtype=torch.float64)
    plain = CG().run(op, b)
    assert products[0] == plain.info.iterations + 2  # the first residual, and the last one
    far = CG().run(Dense(matrix * 2.0**-300), b * 2.0**290)
    assert torch.equal(far.x * 2.0**-590, CG().run(Dense(matrix), b).x)


ESTIMATES: dict[str, Callable[..., Any]] = {
    "hutchinson": lambda op: solvers.trace(op, "hutchinson", samples=30),
    "hutch++": lambda op: solvers.trace(op, "hutch++", samples=30),
    "xtrace": lambda op: solvers.trace(op, "xtrace", samples=20),
    "diagonal": lambda op: solvers.diagonal(op, "hutchinson", samples=20),
    "xdiag": lambda op: solvers.diagonal(op, "xdiag", samples=20),
    "frobenius_norm": lambda op: solvers.frobenius_norm(op, samples=20),
}


@pytest.mark.parametrize("dtype_and_scale", SCALES, ids=str)
def test_estimates_of_any_scale(dtype_and_scale: tuple[torch.dtype, float]) -> None:
    dtype, scale = dtype_and_scale
    power = 2.0 ** round(torch.tensor(scale, dtype=torch.float64).log2().item())
    matrix = positive(60).to(dtype)
    plain, scaled = known_by_products(matrix), known_by_products(matrix * power)
    for name, estimate in ESTIMATES.items():
        one, other = estimate(plain), estimate(scaled)
        torch.testing.assert_close(other.value / power, one.value, rtol=1e-5, atol=0, msg=name)
        torch.testing.assert_close(other.stderr / power, one.stderr, rtol=1e-3, atol=0, msg=name)
    torch.testing.assert_close(
        solvers.eigsh(scaled, k=3).values / power, solvers.eigsh(plain, k=3).values, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        solvers.svds(scaled, k=3).values / power, solvers.svds(plain, k=3).values, rtol=1e-5, atol=0
    )
    shift = 60 * torch.tensor(power, dtype=torch.float64).log()
    one, other = (solvers.logdet(op, method="slq", samples=5) for op in (plain, scaled))
    torch.testing.assert_close(other.value.double() - shift, one.value.double(), rtol=0, atol=1e-2)
