"""The warm-started QR step follows a matrix that changes slowly, and keeps order and sign."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    BlockDiagonal,
    Dense,
    Eigen,
    Eigh,
    Kronecker,
    LinearOperator,
    NotConvergedError,
    NotConvergedWarning,
    Segment,
    Subspace,
)
from solvers.direct.orthogonal_iteration import off_diagonal_fraction
from tests.solvers import dense_reference as reference
from tests.solvers.contracts import SolverContract
from tests.solvers.problems import normal, positive, with_spectrum

SPECTRUM = [0.1, 0.5, 1.0, 2.0, 5.0, 12.0]


class TestSubspace(SolverContract):
    tolerance = 1e-12

    def solver(self) -> solvers.Solver:
        return Subspace(on_failure="raise")

    def operators(self) -> list[tuple[LinearOperator, Tensor]]:
        kron = reference.kron(positive(2), positive(3))
        return [
            (Dense(positive(4)), positive(4)),
            (Dense(positive(3, 2)), reference.block_diagonal(*positive(3, 2))),
            (Kronecker(positive(2), positive(3)).shift(0.1), kron + 0.1 * torch.eye(6, dtype=torch.float64)),
        ]


def test_true_basis_is_a_fixed_point() -> None:
    for matrix in (with_spectrum(SPECTRUM), with_spectrum([0.0, 0.0, 1.0, 2.0]), with_spectrum([-3.0, 1.0, 2.0])):
        values, basis = Eigh().basis(matrix)
        again, q = Subspace(steps=3).basis(matrix, basis)
        torch.testing.assert_close(q, basis, rtol=0, atol=1e-7)
        torch.testing.assert_close(again, values)


def test_steps_converge_to_the_eigenbasis_in_the_previous_order() -> None:
    matrix = with_spectrum(SPECTRUM)
    values, basis = Eigh().basis(matrix)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    start = torch.linalg.qr(basis[:, order] * torch.tensor([1, -1, 1, -1, 1, -1]) + 0.05 * normal(6, 6))[0]
    # Householder's signs are not ours: keep those of the perturbed columns
    start = start * torch.sign((start * basis[:, order] * torch.tensor([1, -1, 1, -1, 1, -1])).sum(0))
    found, q = Subspace(steps=60).basis(matrix, start)
    torch.testing.assert_close(found, values[order])
    torch.testing.assert_close(q, basis[:, order] * torch.tensor([1, -1, 1, -1, 1, -1]), rtol=0, atol=1e-8)


def test_a_step_is_orthogonal_and_reduces_the_off_diagonal_part() -> None:
    old, new = with_spectrum(SPECTRUM), with_spectrum(SPECTRUM) + 0.05 * positive(6)
    _, basis = Eigh().basis(old)
    values, q = Subspace().basis(new, basis)
    torch.testing.assert_close(q.mT @ q, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(values, (q.mT @ new @ q).diagonal())
    assert float(off_diagonal_fraction(q.mT @ new @ q)) < float(off_diagonal_fraction(basis.mT @ new @ basis))


def test_a_good_basis_is_kept() -> None:
    matrix = with_spectrum(SPECTRUM)
    _, basis = Eigh().basis(matrix + 1e-4 * positive(6))
    _, kept = Subspace(tolerance=1e-2).basis(matrix, basis)
    _, stepped = Subspace(tolerance=1e-9).basis(matrix, basis)
    assert torch.equal(kept, basis) and not torch.equal(stepped, basis)


def test_powers_start_from_the_previous_result() -> None:
    op, near = Dense(with_spectrum(SPECTRUM)), Dense(with_spectrum(SPECTRUM) + 1e-3 * positive(6))
    first = solvers.power(op, -0.5, Subspace())
    second = solvers.power(near, -0.5, Subspace(steps=5), previous=first)
    assert isinstance(first, Eigen) and isinstance(second, Eigen)
    torch.testing.assert_close(second.to_dense(), reference.power(near.matrix, -0.5), rtol=0, atol=1e-3)
    far = Dense(with_spectrum(SPECTRUM, seed=5))
    with pytest.warns(NotConvergedWarning, match=r"Subspace has not converged on Dense\(6x6\)"):
        solvers.power(far, -0.5, Subspace(), previous=first)
    with pytest.raises(NotConvergedError):
        solvers.power(far, -0.5, Subspace(on_failure="raise"), previous=first)


def test_diagonalize_hands_each_part_its_previous_basis() -> None:
    def operator(change: float) -> LinearOperator:
        kron = Kronecker(positive(2) + change * positive(2, seed=4), positive(3) + change * positive(3, seed=4))
        return BlockDiagonal([kron, Dense(positive(2))], [Segment(0, (2, 3)), Segment(6, (2,))], 8)

    old = solvers.diagonalize(operator(0.0))
    warm = solvers.diagonalize(operator(0.01), Subspace(steps=200), previous=old)
    torch.testing.assert_close(warm.to_dense(), operator(0.01).to_dense(), rtol=1e-6, atol=1e-6)
    one = solvers.diagonalize(operator(0.01), Subspace(), previous=old)
    assert isinstance(one, BlockDiagonal) and isinstance(old, BlockDiagonal)
    new_basis, old_basis = (op.blocks[0].basis.factors[0].matrix for op in (one, old))  # type: ignore[attr-defined]
    expected = Subspace().basis(positive(2) + 0.01 * positive(2, seed=4), old_basis)[1]
    assert torch.equal(new_basis, expected)
