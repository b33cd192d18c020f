"""Cholesky, Eigh and the default honour the contract and refuse what they cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    Auto,
    BlockDiagonal,
    Cholesky,
    CholeskyInverse,
    Dense,
    Diagonal,
    Eigen,
    Eigh,
    FactoredTikhonov,
    Function,
    Kronecker,
    LinearOperator,
    LowRank,
    NonFiniteError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    Segment,
    SingularMatrixError,
    StructureError,
    Subspace,
)
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import SolverContract
from tests.solvers.problems import normal, positive, symmetric, with_spectrum


def structures() -> list[tuple[LinearOperator, Tensor]]:
    values = normal(2, 3).square() + 0.5
    kron = Kronecker(positive(2), positive(3, seed=1))
    q = torch.linalg.qr(normal(3, 3))[0]
    block = BlockDiagonal([kron, Dense(positive(4))], [Segment(4, (2, 3)), Segment(0, (4,))], 10)
    kron_matrix = reference.kron(positive(2), positive(3, seed=1))
    eye = torch.eye(10, dtype=torch.float64)
    return [
        (Dense(positive(4)), positive(4)),
        (Dense(positive(1)), positive(1)),
        (Dense(positive(3, 2)), reference.block_diagonal(*positive(3, 2))),
        (Diagonal(values), values.flatten().diag()),
        (kron, kron_matrix),
        (Eigen(Dense(q), values[0]), q @ values[0].diag() @ q.mT),
        (2.5 * kron, 2.5 * kron_matrix),
        (Dense(positive(4)).shift(0.3), positive(4) + 0.3 * eye[:4, :4]),
        (Diagonal(values).shift(0.3), (values.flatten() + 0.3).diag()),
        (block, reference.block_diagonal(positive(4), kron_matrix)),
    ]


class TestCholesky(SolverContract):
    tolerance = 1e-12

    def solver(self) -> solvers.Solver:
        return Cholesky()

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        return structures()


class TestCholeskyImplicit(TestCholesky):
    def solver(self) -> solvers.Solver:
        return Cholesky(explicit=False)


class TestEigh(SolverContract):
    tolerance = 1e-12

    def solver(self) -> solvers.Solver:
        return Eigh()

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        kron = Kronecker(positive(2, 2), Diagonal(normal(2, 2).square()), positive(3, 2, seed=1))
        stack = [
            reference.kron(positive(2, 2)[g], normal(2, 2).square()[g].diag(), positive(3, 2, seed=1)[g])
            for g in range(2)
        ]
        shifted = reference.block_diagonal(*stack) + 0.3 * torch.eye(24, dtype=torch.float64)
        return [*structures(), (kron.shift(0.3), shifted)]


class TestEighClamped(TestEigh):
    def solver(self) -> solvers.Solver:
        return Eigh("clamped")

    test_zero_operator_is_refused = None  # type: ignore[assignment]


class TestAuto(TestEigh):
    def solver(self) -> solvers.Solver:
        return Auto()


@pytest.mark.parametrize("exponent", [-1, -0.5, 0.5])
def test_modes_of_negative_eigenvalues(exponent: float) -> None:
    values = [-2.0, -0.5, 1.0, 3.0]
    op = Dense(with_spectrum(values))
    absolute = with_spectrum([abs(v) ** exponent for v in values])
    clamped = with_spectrum([max(v, 0.1) ** exponent for v in values])
    torch.testing.assert_close(solvers.power(op, exponent, Eigh("absolute")).to_dense(), absolute)
    torch.testing.assert_close(solvers.power(op, exponent, Eigh("clamped", floor=0.1)).to_dense(), clamped)
    diagonal = Diagonal(torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(
        solvers.power(diagonal, exponent, Eigh("clamped", floor=0.1)).diagonal(),
        diagonal.values.clamp(min=0.1) ** exponent,
    )
    torch.testing.assert_close(
        solvers.power(diagonal, exponent, Eigh("absolute")).diagonal(), diagonal.values.abs() ** exponent
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_floor_keeps_its_precision(dtype):
    """Rounded to float32, 0.1 would be off by 1.5e-9."""
    op = Dense(torch.diag(torch.tensor([1e-3, 2.0], dtype=dtype)))
    found = solvers.power(op, 1, Eigh("clamped", floor=0.1)).to_dense()
    assert torch.equal(found, torch.diag(torch.tensor([0.1, 2.0], dtype=dtype)))


def test_plain_inverts_an_indefinite_matrix_but_takes_no_root() -> None:
    matrix = symmetric(5)
    torch.testing.assert_close(Dense(matrix).inverse(solver=Eigh()).to_dense(), reference.power(matrix, -1))
    with pytest.raises(NotPositiveDefiniteError, match=r"Dense\(5x5\) has the eigenvalue -.* no real power 0.5"):
        solvers.power(Dense(matrix), 0.5, Eigh())
    with pytest.raises(NotPositiveDefiniteError, match=r"no real power -0.5"):
        solvers.power(Diagonal(torch.tensor([1.0, -1.0])), -0.5)


def test_root_of_a_singular_matrix_is_fine_and_its_inverse_refused() -> None:
    root = normal(5, 2)
    matrix = root @ root.mT
    half = solvers.power(Dense(matrix), 0.5, Eigh()).to_dense()
    torch.testing.assert_close(half @ half, matrix)
    with pytest.raises(SingularMatrixError, match=r"Dense\(5x5\) is singular: .*more damping"):
        Dense(matrix).inverse(solver=Eigh())
    with pytest.raises(NotPositiveDefiniteError, match=r"Cholesky cannot invert Dense\(5x5\).*smallest eigenvalue"):
        Dense(matrix - 1e-9 * torch.eye(5, dtype=torch.float64)).inverse(solver=Cholesky())
    with pytest.raises(SingularMatrixError, match=r"Diagonal\(2\) is singular"):
        Diagonal(torch.tensor([1.0, 0.0])).inverse()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("solver", [Cholesky(), Cholesky(explicit=False), Eigh(), Eigh("clamped"), Auto()])
def test_badly_scaled(solver: solvers.Solver, scale: float) -> None:
    x = normal(4)
    torch.testing.assert_close(Dense(scale * positive(4)).inverse(solver=solver) @ (scale * (positive(4) @ x)), x)
    diagonal = Diagonal(torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64))
    torch.testing.assert_close(diagonal.inverse(solver=Auto()).diagonal(), 1 / diagonal.values)


def test_repeated_eigenvalues_and_empty() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(solvers.power(Dense(4 * eye), -0.5).to_dense(), eye / 2)
    for solver in (Cholesky(), Eigh(), Eigh("clamped")):
        assert Dense(torch.zeros(0, 0)).inverse(solver=solver).to_dense().shape == (0, 0)


@pytest.mark.parametrize("solver", [Cholesky(), Cholesky(explicit=False), Eigh(), Auto()])
def test_asymmetric_matrix_is_refused(solver: solvers.Solver) -> None:
    with pytest.raises(NotSymmetricError, match=r"Dense\(3x3\) is not symmetric.*Symmetrise"):
        Dense(positive(3) + normal(3, 3)).inverse(solver=solver)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [Cholesky(), Cholesky(explicit=False), Eigh()])
def test_half_precision_is_answered_in_float32(solver: solvers.Solver, dtype: torch.dtype) -> None:
    matrix = positive(4).to(dtype)
    inverse = Dense(matrix).inverse(solver=solver)
    assert inverse.dtype == torch.float32
    # The solve is float32 on the rounded matrix, so only float32's error remains: 6e-8 times a condition of 10.
    torch.testing.assert_close(inverse.to_dense().double(), reference.power(matrix, -1), rtol=1e-5, atol=1e-5)


def test_half_precision_of_every_structure_is_answered_in_float32() -> None:
    # An eigenbasis is left out: rounded to bfloat16 it is not orthogonal, and so not what its inverse assumes.
    operators = [op for op, _ in structures() if not isinstance(op, Eigen)]
    for op in [*operators, LowRank(normal(2, 4)).shift(0.3)]:
        half = op.to(torch.bfloat16)
        expected = reference.power(half.to(torch.float64).to_dense(), -1)
        result = solvers.power(half, -1)
        assert result.dtype == torch.float32
        # float32 roundings (6e-8) times conditions up to 100
        torch.testing.assert_close(result.to_dense().double(), expected, rtol=1e-4, atol=1e-4)
        assert solvers.solve(half, normal(*op.in_shape).bfloat16()).dtype == torch.float32
        if not isinstance(op, solvers.Shifted):
            assert solvers.diagonalize(half).dtype == torch.float32


@pytest.mark.parametrize("solver", [Eigh(), Auto(), None])
def test_exact_damping_of_kronecker_equals_dense_inverse(solver: solvers.Solver | None) -> None:
    op = Kronecker(positive(4), positive(3))
    dense = reference.kron(positive(4), positive(3)) + 0.03 * torch.eye(12, dtype=torch.float64)
    inverse = op.inverse(0.03, solver)
    assert isinstance(inverse, Eigen) and isinstance(inverse.basis, Kronecker)
    torch.testing.assert_close(inverse.to_dense(), reference.power(dense, -1), rtol=0, atol=1e-12)


def test_a_shift_of_kronecker_has_no_cholesky_inverse() -> None:
    op = Kronecker(positive(4), positive(3))
    with pytest.raises(StructureError) as error:
        op.inverse(0.03, Cholesky())
    assert str(error.value) == (
        "Cholesky cannot invert Kronecker(4x4, 3x3) + 0.03 I: the sum has no Kronecker inverse. "
        "Use Eigh() for the exact inverse or FactoredTikhonov(0.03)."
    )
    assert isinstance(op.inverse(FactoredTikhonov(0.03), Cholesky()), Kronecker)


def test_a_product_of_one_factor_takes_its_shift() -> None:
    inverse = Kronecker(positive(4)).inverse(0.3, Cholesky())
    torch.testing.assert_close(
        inverse.to_dense(), reference.power(positive(4) + 0.3 * torch.eye(4, dtype=torch.float64), -1)
    )


def test_unknown_structure_is_dense_only_on_request() -> None:
    op = Kronecker(positive(2), positive(3)) + Kronecker(positive(2, seed=1), positive(3, seed=2))
    matrix = reference.kron(positive(2), positive(3)) + reference.kron(positive(2, seed=1), positive(3, seed=2))
    for solver in (Cholesky(), Eigh()):
        with pytest.raises(StructureError, match=r"needs Dense, not Sum.*dense=True"):
            solvers.power(op, -1, solver)
        inverse = solvers.power(op, -1, solver, dense=True)
        assert inverse.in_shape == (2, 3)
        torch.testing.assert_close(inverse.to_dense(), reference.power(matrix, -1))
    function = Function(lambda x: x @ positive(4), (4,), symmetric=True, dtype=torch.float64)
    with pytest.raises(StructureError, match="needs Dense"):
        function.inverse(0.5)
    expected = reference.power(positive(4) + 0.5 * torch.eye(4, dtype=torch.float64), -1)
    torch.testing.assert_close(function.inverse(0.5, dense=True).to_dense(), expected)
    torch.testing.assert_close(solvers.solve(function.shift(0.5), normal(4), dense=True), expected @ normal(4))


def test_inverse_of_a_product_is_reversed() -> None:
    op = Dense(positive(4)) @ Diagonal(normal(4).square() + 1)
    matrix = positive(4) @ (normal(4).square() + 1).diag()
    torch.testing.assert_close(op.inverse().to_dense() @ matrix, torch.eye(4, dtype=torch.float64))
    with pytest.raises(StructureError):
        solvers.power(op, 0.5, Eigh())


def test_diagonalize_keeps_structure_and_ascends() -> None:
    for op, matrix in structures():
        eigen = solvers.diagonalize(op)
        torch.testing.assert_close(eigen.to_dense(), matrix)
        blocks = eigen.blocks if isinstance(eigen, BlockDiagonal) else [eigen]
        assert all(isinstance(block, Eigen) for block in blocks)
    eigen = solvers.diagonalize(Dense(positive(4)))
    assert isinstance(eigen, Eigen)
    np.testing.assert_allclose(eigen.values, np.linalg.eigvalsh(positive(4)))
    with pytest.raises(StructureError, match=r"has no eigenbasis by structure"):
        solvers.diagonalize(Kronecker(positive(2), positive(3)) + Kronecker(positive(2), positive(3)))


def test_non_finite_is_refused_everywhere() -> None:
    bad = positive(3)
    bad[1, 1] = torch.nan
    operators = [
        Dense(bad),
        Kronecker(positive(2), bad),
        Kronecker(positive(2), bad).shift(1.0),
        Diagonal(bad),
        BlockDiagonal([Dense(positive(3)), Dense(bad)], [Segment(0, (3,)), Segment(3, (3,))], 6),
    ]
    for op in operators:
        for solver in (Cholesky(), Eigh(), Eigh("absolute"), Eigh("clamped"), Auto()):
            if isinstance(op, solvers.Shifted) and isinstance(solver, Cholesky):
                continue
            with pytest.raises(NonFiniteError, match=r"(Dense\(3x3\)|Diagonal\(3x3\)) h(olds|as) NaN or infinity"):
                solvers.power(op, -1, solver)


@pytest.mark.parametrize("entry", [(0, 2), (2, 0)])
@pytest.mark.parametrize("solver", [Cholesky(), Cholesky(explicit=False), Eigh(), Eigh("clamped"), Auto(), Subspace()])
def test_non_finite_in_one_triangle_is_seen(solver: solvers.Solver, entry: tuple[int, int]) -> None:
    for bad in (torch.nan, torch.inf):
        matrix = positive(3)
        matrix[entry] = bad
        with pytest.raises(NonFiniteError, match=r"Dense\(3x3\) holds NaN or infinity"):
            Dense(matrix).inverse(solver=solver)


def test_overflowing_inverse_is_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"overflows torch.float32"):
        Diagonal(torch.tensor([1e-42])).inverse()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mode is one of plain, absolute, clamped"):
        Eigh("abs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floor is a positive number"):
        Eigh("plain", floor=0.1)
    with pytest.raises(ValueError, match=r"floor is a positive number"):
        Eigh("clamped", floor=0.0)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (301,), (2, 700)])
def test_the_half_of_a_cholesky_inverse_is_a_root_of_what_was_inverted(shape):
    """Large triangles are multiplied in parts."""
    n = shape[-1]
    root = torch.randn(*shape, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = root @ root.mT + n * torch.eye(n, dtype=torch.float64)
    inverse = solvers.power(Dense(matrix), -1, Cholesky(explicit=False))
    assert isinstance(inverse, CholeskyInverse)
    x = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    half = inverse.half(x)
    torch.testing.assert_close(half.mT @ half, x.mT @ matrix @ x)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("size", [6, 448])  # at once, and by blocks
def test_a_cholesky_inverse_is_differentiated_forwards(size: int, explicit: bool) -> None:
    A, T = positive(size), symmetric(size)
    ones = torch.ones(size, dtype=A.dtype)

    def total(matrix: Tensor) -> Tensor:
        return (solvers.Cholesky(explicit=explicit).power(solvers.Dense(matrix), -1) @ ones).sum()

    _, found = torch.func.jvp(total, (A,), (T,))
    solution = torch.linalg.solve(A, ones)
    torch.testing.assert_close(found, -(solution @ T @ solution), rtol=1e-9, atol=0)
