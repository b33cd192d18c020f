"""What holds for every operator: random structures, shapes and shifts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import solvers
from solvers import BlockDiagonal, Dense, Diagonal, Kronecker, LinearOperator, LowRank, Segment
from tests.solvers.problems import normal, positive, symmetric

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


@st.composite
def expressions(draw: Callable) -> tuple[LinearOperator, Tensor]:
    """Sums, products, multiples, shifts, adjoints and parts of operators on vectors, with their matrices."""
    n, seed = draw(st.integers(1, 5)), draw(seeds)
    leaves: list[LinearOperator] = [
        Dense(normal(n, n, seed=seed)),
        Dense(symmetric(n, seed=seed)),
        Diagonal(normal(n, seed=seed)),
        LowRank(normal(2, n, seed=seed)),
        solvers.diagonalize(Dense(symmetric(n, seed=seed))),
        BlockDiagonal([Dense(normal(n, n, seed=seed))], [Segment(0, (n,))], n),
    ]
    op = leaves[draw(st.integers(0, len(leaves) - 1))]
    matrix = op.to_dense()
    for _ in range(draw(st.integers(0, 4))):
        number = draw(st.floats(-2, 2))
        other = leaves[draw(st.integers(0, len(leaves) - 1))]
        match draw(st.sampled_from(["scale", "shift", "adjoint", "plus", "times", "part"])):
            case "scale":
                op, matrix = number * op, number * matrix
            case "shift":
                op, matrix = op.shift(number), matrix + number * torch.eye(n, dtype=torch.float64)
            case "adjoint":
                op, matrix = op.adjoint(), matrix.mT
            case "plus":
                op, matrix = op + other, matrix + other.to_dense()
            case "times":
                op, matrix = op @ other, matrix @ other.to_dense()
            case "part":
                order = torch.arange(n).flip(0)
                op, matrix = op.submatrix(order), matrix.flip(0, 1)
    return op, matrix


@settings(max_examples=150)
@given(expression=expressions(), a=st.floats(-3, 3), seed=seeds)
def test_expressions_are_linear_maps(expression: tuple[LinearOperator, Tensor], a: float, seed: int) -> None:
    op, matrix = expression
    n = matrix.shape[0]
    x, y = normal(2, n, seed=seed), normal(2, n, seed=seed + 100)
    scale = float(matrix.abs().max()) + 1
    torch.testing.assert_close(op @ x, x @ matrix.mT, rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(op @ (x + a * y), op @ x + a * (op @ y), rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(((op @ x) * y).sum(), (x * (op.adjoint() @ y)).sum(), rtol=0, atol=1e-10 * scale)
    if op.symmetric:
        torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-7 * scale)


@settings(max_examples=40)
@given(op=positive_operators(), k=st.integers(1, 3))
def test_eigenpairs_of_every_structure(op: LinearOperator, k: int) -> None:
    k = min(k, op.shape[0])
    pairs = solvers.eigsh(op, k)
    expected = torch.linalg.eigvalsh(op.to_dense()).flip(0)[:k]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-10, atol=1e-10)
    shape = (k, *(1,) * len(op.in_shape))
    torch.testing.assert_close(op @ pairs.vectors, pairs.values.reshape(shape) * pairs.vectors, rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(op=positive_operators(), seed=seeds)
def test_estimates_of_every_structure(op: LinearOperator, seed: int) -> None:
    matrix = op.to_dense()
    torch.testing.assert_close(solvers.trace(op).value, matrix.trace())
    generator = torch.Generator().manual_seed(seed)
    estimate = solvers.trace(op, "hutchinson", samples=60, generator=generator)
    assert (estimate.value - matrix.trace()).abs() <= 6 * estimate.stderr + 1e-9
    x = normal(*op.in_shape, seed=seed)
    form = solvers.quadratic_form(op, x, torch.log)
    expected = x.flatten() @ (_function(matrix, torch.log) @ x.flatten())
    torch.testing.assert_close(form.value, expected, rtol=1e-7, atol=1e-7)


def _function(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.mT
