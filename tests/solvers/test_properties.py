"""What holds for every operator: random structures, shapes and shifts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import solvers
from solvers import BlockDiagonal, Dense, Diagonal, Kronecker, LinearOperator, LowRank, Segment
from tests.solvers.problems import normal, positive

sizes = st.integers(1, 4)
seeds = st.integers(0, 50)


@st.composite
def positive_operators(draw: Callable) -> LinearOperator:
    """Positive definite operators of every structure, with and without stacks."""
    kind = draw(st.sampled_from(["dense", "diagonal", "kronecker", "shifted", "lowrank", "eigen", "blocks"]))
    n, m, seed = draw(sizes), draw(sizes), draw(seeds)
    stack = draw(st.sampled_from([(), (2,), (2, 1)]))
    kron = Kronecker(positive(n, *stack, seed=seed), positive(m, *stack, seed=seed + 1))
    match kind:
        case "dense":
            return Dense(positive(n, *stack, seed=seed))
        case "diagonal":
            return Diagonal(normal(n, m, seed=seed).square() + 0.1)
        case "kronecker":
            return Kronecker(*kron.factors, Diagonal(normal(*stack, 2, seed=seed).square() + 0.1))
        case "shifted":
            return kron.shift(draw(st.floats(1e-3, 10)))
        case "lowrank":
            return LowRank(normal(m, n, 2, seed=seed)).shift(draw(st.floats(1e-1, 10)))
        case "eigen":
            return solvers.diagonalize(kron)
    shape = kron.in_shape
    place = Segment(n, shape)
    return BlockDiagonal([kron, Dense(positive(n))], [place, Segment(0, (n,))], n + kron.shape[0])


@settings(max_examples=60)
@given(op=positive_operators(), seed=seeds)
def test_inverse_undoes(op: LinearOperator, seed: int) -> None:
    x = normal(2, *op.in_shape, seed=seed)
    torch.testing.assert_close(op.inverse() @ (op @ x), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(op @ (op.inverse() @ x), x, rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(op=positive_operators(), exponent=st.sampled_from([-1, -0.5, -0.25, 0.5]))
def test_powers_multiply(op: LinearOperator, exponent: float) -> None:
    x = normal(*op.in_shape)
    halves = solvers.power(op, exponent / 2)
    torch.testing.assert_close(halves @ (halves @ x), solvers.power(op, exponent) @ x, rtol=1e-7, atol=1e-7)


@settings(max_examples=40)
@given(op=positive_operators(), lam=st.floats(1e-3, 10), seed=seeds)
def test_shift_adds_a_multiple(op: LinearOperator, lam: float, seed: int) -> None:
    x = normal(*op.in_shape, seed=seed)
    torch.testing.assert_close(op.shift(lam) @ x, op @ x + lam * x)
    torch.testing.assert_close(op.shift(lam).inverse() @ (op @ x + lam * x), x, rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(op=positive_operators())
def test_exact_scalars_agree_with_the_matrix(op: LinearOperator) -> None:
    matrix: Tensor = op.to_dense()
    torch.testing.assert_close(op.trace(), matrix.trace())
    torch.testing.assert_close(op.diagonal().flatten(), matrix.diagonal())
    torch.testing.assert_close(op.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    torch.testing.assert_close(op.logdet(), torch.linalg.slogdet(matrix).logabsdet, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(op=positive_operators())
def test_a_huge_damping_divides(op: LinearOperator) -> None:
    x = normal(*op.in_shape)
    torch.testing.assert_close(1e9 * (op.inverse(1e9) @ x), x, rtol=0, atol=1e-6 * float(op.trace()))
