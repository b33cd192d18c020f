"""Decompositions of structured matrices are right, and errors keep their cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    CG,
    MINRES,
    Cholesky,
    CoupledNewton,
    Dense,
    Eigh,
    InFloat64,
    Kronecker,
    LowRank,
    NewtonSchulz,
    NonFiniteError,
    NotSymmetricError,
    SolverError,
    Subspace,
    Woodbury,
    ladder,
)
from solvers.operators.decompositions import eigendecomposition, eigenvalues, power_of_two, singular_value_decomposition
from solvers.outcome.remedies import FLOAT64, PERTURBED, remedies
from tests.solvers.problems import normal, positive
from tests.solvers.structured import structured

DTYPES = [torch.float32, torch.float64]


def cases(sizes: list[int], seeds: int) -> Iterator[tuple[str, Tensor]]:
    for n in sizes:
        for seed in range(seeds):
            yield from ((f"{name}, {n}, {seed}", matrix) for name, matrix in structured(n, seed))


def check_eigenpairs(name: str, matrix: Tensor, values: Tensor, basis: Tensor) -> None:
    """Backward error and loss of orthogonality of LAPACK's routines are a few ``n eps``, relative to the norm."""
    n, eps = matrix.shape[-1], torch.finfo(matrix.dtype).eps
    size = matrix.double().abs().amax().clamp(min=1e-300)
    scaled, q = values.double() / size, basis.double()
    eye = torch.eye(n, dtype=torch.float64)
    tolerance = 10 * max(n, 3) * eps
    assert bool((values.diff() >= 0).all()), name
    assert float((q.mT @ q - eye).abs().amax()) <= tolerance, name
    # The backward error goes with the norm, which for ones beside an identity is n times the largest entry.
    backward = max(tolerance, 100 * eps * float(scaled.abs().amax()))
    assert float(((q * scaled) @ q.mT - matrix.double() / size).abs().amax()) <= backward, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_eigenvectors_of_structured_matrices(dtype: torch.dtype) -> None:
    for name, matrix in [*cases([1, 2, 5, 33, 130], 3), *cases([257], 2)]:
        values, basis = Eigh().basis(matrix.to(dtype))
        check_eigenpairs(name, matrix.to(dtype), values, basis)
        torch.testing.assert_close(
            eigenvalues(matrix.to(dtype)) / power_of_two(matrix).squeeze(),
            (values / power_of_two(matrix).squeeze()),
            rtol=0,
            atol=20 * max(matrix.shape[-1], 3) * torch.finfo(dtype).eps,
            check_dtype=False,
        )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*range(3, 70, 7), 100, 255, 256, 257, 400, 512, 640, 1000, 1024])
def test_eigenvectors_at_every_size(n: int, dtype: torch.dtype) -> None:
    for name, matrix in cases([n], 8 if n < 512 else 2):
        check_eigenpairs(name, matrix.to(dtype), *Eigh().basis(matrix.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_cost_nothing_and_have_unit_eigenvectors(dtype: torch.dtype, monkeypatch: Any) -> None:
    sizes: list[int] = []
    routine = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sizes.append(m.shape[-1]) or routine(m))  # type: ignore[func-returns-value]
    kept = torch.tensor([2, 3, 7])
    matrix = torch.zeros(9, 9, dtype=dtype)
    matrix[kept[:, None], kept] = (positive(3) - torch.eye(3, dtype=torch.float64)).to(dtype)  # of both signs
    values, basis = eigendecomposition(matrix)
    assert sizes == [3]
    check_eigenpairs("zeros", matrix, values, basis)
    outside = torch.tensor([0, 1, 4, 5, 6, 8])
    assert torch.equal(basis[outside].abs().sum(0), (values == 0).to(dtype))
    assert bool((values == 0).sum() == 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_block_of_a_stack_has_its_own_zeros(dtype: torch.dtype, monkeypatch: Any) -> None:
    blocks = [matrix for name, matrix in structured(40, 0) if "zeros" in name or name == "full"]
    stack = torch.stack(blocks).to(dtype)[:, None]
    routine = torch.linalg.eigh
    for fails in (False, True):  # together, or one by one after a failure
        if fails:
            monkeypatch.setattr(torch.linalg, "eigh", lambda m: gives_up(m) if m.ndim > 2 else routine(m))
        values, basis = Eigh().basis(stack)
        assert values.shape == (len(blocks), 1, 40) and basis.shape == (len(blocks), 1, 40, 40)
        for matrix, s, q in zip(stack, values, basis, strict=True):
            check_eigenpairs("stack", matrix[0], s[0], q[0])


def gives_up(matrix: Tensor) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def failing(routine: Callable[..., Any], times: int, error: Callable[..., Any] = gives_up) -> Callable[..., Any]:
    """The routine after some failures."""
    left = [times]

    def call(matrix: Tensor, **options: Any) -> Any:
        left[0] -= 1
        return error(matrix) if left[0] >= 0 else routine(matrix, **options)

    return call


def returns_nan(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix[..., 0], matrix * torch.nan


@pytest.mark.parametrize("error", [gives_up, returns_nan])
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_what_lapack_fails_on_is_tried_again(
    dtype: torch.dtype, scale: float, fails: int, error: Callable[..., Any], monkeypatch: Any
) -> None:
    matrix = (scale * positive(20)).to(dtype)
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, fails, error))
    with remedies() as found:
        values, basis = Eigh().basis(matrix)
    assert found == {FLOAT64 if fails == 1 else PERTURBED: 1}
    check_eigenpairs("again", matrix, values, basis)


def test_singular_values_are_tried_again(monkeypatch: Any) -> None:
    matrix = normal(6, 4).float()
    for fails in range(5):
        with monkeypatch.context() as patch, remedies() as found:
            patch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, fails))
            left, values, right = singular_value_decomposition(matrix)
        assert sum(found.values()) == (fails > 0)
        torch.testing.assert_close((left * values) @ right, matrix, rtol=0, atol=1e-5)
        torch.testing.assert_close(values.double(), torch.linalg.svdvals(matrix.double()), rtol=0, atol=1e-5)


def test_the_error_says_what_was_tried_and_what_is_wrong(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    with pytest.raises(
        SolverError, match=r"Dense\(3x3\) did not converge: not in torch.float32, not in float64.*finite"
    ):
        Eigh().basis(positive(3).float())
    bad = positive(3)
    bad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"Dense\(3x3\) holds NaN or infinity"):
        Eigh().basis(Dense(bad, is_gram=True))
    with pytest.raises(NonFiniteError, match=r"Dense\(3x2\) holds NaN or infinity"):
        singular_value_decomposition(torch.full((3, 2), torch.inf))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling ..."),
        KeyboardInterrupt(),
    ],
)
@pytest.mark.parametrize("solver", [Eigh(), Cholesky(), Subspace(), NewtonSchulz(), CoupledNewton(), ladder()])
def test_memory_that_runs_out_keeps_its_name(solver: solvers.Solver, error: BaseException, monkeypatch: Any) -> None:
    def no_memory(*args: Any, **options: Any) -> Any:
        raise error

    for name in ("eigh", "cholesky_ex", "qr", "matrix_norm", "svd"):
        monkeypatch.setattr(torch.linalg, name, no_memory)
    with pytest.raises(type(error)) as raised:
        solvers.power(Dense(positive(3)), -1, solver)
    assert raised.value is error


DIRECT: list[solvers.Solver] = [
    Eigh(),
    Cholesky(),
    Cholesky(explicit=False),
    Subspace(),
    InFloat64(Cholesky()),
    ladder(),
]
ITERATED: list[solvers.Solver] = [NewtonSchulz(), CoupledNewton(), CG(rtol=1e-4), MINRES(rtol=1e-4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [*DIRECT, *ITERATED], ids=lambda solver: type(solver).__name__)
def test_damped_inverses_of_structured_matrices(solver: solvers.Solver, dtype: torch.dtype) -> None:
    for name, matrix in cases([1, 5, 60], 2):
        size = float(matrix.abs().max()) or 1.0
        if name.startswith("subnormal") and dtype == torch.float32:
            continue  # the inverse of 1e-40 is no float32 number
        n = matrix.shape[0]
        op = Dense(matrix.to(dtype), is_gram=True).add_diagonal(1e-2 * size)
        v = torch.ones(n, dtype=dtype)
        found = (op.matrix.double() / size) @ ((solvers.power(op, -1, solver) @ v).double() * size)
        # The condition is at most 100 n; the error of a solve is that many roundings, or what an iteration stops at.
        tolerance = 100 * n * 10 * torch.finfo(dtype).eps if solver in DIRECT else 2e-2
        assert float((found - v.double()).norm()) <= tolerance * n**0.5, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_damping_of_structured_factors(dtype: torch.dtype) -> None:
    for (name, B), (other, A) in zip(structured(7, 0), structured(40, 1), strict=True):
        if "subnormal" in name or "tiny" in name or "huge" in name:
            continue
        op = Kronecker(B.to(dtype), A.to(dtype))
        lam = 1e-2 * (float(B.abs().max() * A.abs().max()) or 1.0)
        v = torch.ones(7, 40, dtype=dtype)
        x = (op.inverse(damping=lam) @ v).double()
        residual = B @ x @ A.mT + lam * x - 1
        assert float(residual.abs().max()) <= 1e5 * torch.finfo(dtype).eps, (
            name,
            other,
        )  # condition about 7 * 40 * 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_woodbury_of_structured_roots(dtype: torch.dtype) -> None:
    for name, matrix in cases([5, 60], 1):
        if any(word in name for word in ("subnormal", "tiny", "huge")):
            continue
        root = matrix.to(dtype)
        size = float((root.double() @ root.double()).abs().max()) or 1.0
        for exponent in (-1, -0.5):
            op = LowRank(root).shift(1e-2 * size)
            inverse = solvers.power(op, exponent, Woodbury())
            x = torch.ones(len(root), dtype=dtype)
            for _ in range(round(-1 / exponent)):
                x = inverse @ x
            x = x.double()
            residual = root.double().mT @ (root.double() @ x) + 1e-2 * size * x - 1
            assert float(residual.abs().max()) <= 1e6 * torch.finfo(dtype).eps, (name, exponent)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_warm_started_basis_stays_orthonormal(dtype: torch.dtype) -> None:
    for name, matrix in cases([5, 60], 2):
        start = torch.linalg.qr(normal(*matrix.shape)).Q.to(dtype)
        values, basis = Subspace(steps=2).basis(Dense(matrix.to(dtype), is_gram=True), start)
        eye = torch.eye(len(matrix), dtype=torch.float64)
        assert float((basis.double().mT @ basis.double() - eye).abs().max()) <= 1e3 * torch.finfo(dtype).eps, name
        size = float(matrix.abs().max()) or 1.0
        quotients = (basis.double() * ((matrix / size) @ basis.double())).sum(0)
        gap = float((values.double() / size - quotients).abs().max())
        assert gap <= 10 * len(matrix) * torch.finfo(dtype).eps, name
        if name.startswith("zero,"):
            torch.testing.assert_close(basis, start)  # nothing was learnt


def test_float32_rounding_in_a_float64_container_is_symmetric_enough() -> None:
    x = normal(50, 7).float()
    skewed = x @ x.mT + 1e-6 * 30 * normal(50, 50, seed=1).float()  # a few of float32's roundings
    for op in (Dense(skewed.double()), Dense(skewed.double()).add_diagonal(0.1)):
        assert op.symmetric
        Eigh().basis(op)
    inexact = Dense(x.double() @ x.double().mT + 1e-6 * 30 * normal(50, 50, seed=1))
    with pytest.raises(NotSymmetricError):
        Eigh().basis(inexact)
    wrong = skewed.double()
    wrong[0, 1] += 0.125  # of 20 or so: no rounding, though a float32 number
    with pytest.raises(NotSymmetricError):
        Eigh().basis(wrong)


def test_eigenvalues_whose_sum_overflows_are_taken_as_they_are() -> None:
    """A sum says whether they are finite, unless it overflows itself; a remedy would work on another matrix."""
    top = 0.9 * torch.finfo(torch.float32).max
    with remedies() as found:
        values, basis = eigendecomposition(torch.diag(torch.tensor([top, top, 1.0])))
    assert not torch.isfinite(values.sum())
    torch.testing.assert_close(values, torch.tensor([1.0, top, top]))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(3))
    assert not found
