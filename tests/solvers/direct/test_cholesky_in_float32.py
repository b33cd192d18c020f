"""Why does Cholesky not try again in float64? Where float32 fails, the rounded entries have another inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from solvers import Cholesky, Dense, NonFiniteError, NotPositiveDefiniteError, Shifted
from solvers.direct.cholesky import cholesky_factor

EPS = torch.finfo(torch.float32).eps


def matrix(n: int, smallest: float, few: bool) -> tuple[Tensor, Tensor]:
    """A matrix of norm 1 in float64 and its inverse; one eigenvalue, or half of them, are the smallest."""
    values = torch.logspace(0, -3, n, dtype=torch.float64)
    values[-1 if few else n // 2 :] = smallest
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64))[0]
    return (Q * values) @ Q.T, (Q / values) @ Q.T


def distance(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found.double() - exact, 2) / torch.linalg.matrix_norm(exact, 2))


@pytest.mark.parametrize("few", [True, False], ids=["one direction", "half of them"])
@pytest.mark.parametrize("n", [8, 40, 200])
def test_what_it_refuses_has_no_inverse_to_find(n: int, few: bool) -> None:
    refused = 0
    for share in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        A, inverse = matrix(n, share * EPS, few)
        rounded = (A.float() + A.float().T) / 2
        try:
            Cholesky().power(Dense(rounded), -1)
        except NotPositiveDefiniteError:
            refused += 1
            assert share < 1
            # Exact arithmetic on what float32 holds: not positive definite, or another inverse.
            values = torch.linalg.eigvalsh(rounded.double())
            assert values[0] <= 0 or distance(torch.linalg.inv(rounded.double()), inverse) > 0.1
            # The matrix in float64 is served.
            exact = Cholesky().power(Dense((A + A.T) / 2), -1).to_dense()
            assert distance(exact, inverse) < 1e-4
    assert refused or few


@pytest.mark.parametrize("n", [8, 40, 200])
def test_scales_of_the_rows_do_not_matter(n: int) -> None:
    """Rows of norms 1e-12 to 1e12, and the digits that the matrix without them has."""
    A, inverse = matrix(n, 1e-3, True)
    scale = torch.logspace(-6, 6, n, dtype=torch.float64)  # on both sides
    scaled = (scale[:, None] * A * scale).float()
    found = Cholesky().power(Dense((scaled + scaled.T) / 2), -1).to_dense().double()
    assert distance(scale[:, None] * found * scale, inverse) < 1e4 * EPS


def extended_triangle(A: Tensor) -> Tensor:
    """L by the definition, column by column in extended precision: LAPACK's own is off by some roundings in float64."""
    rest = A.numpy().astype(np.longdouble)
    columns = np.zeros_like(rest)
    for j in range(len(rest)):
        columns[j:, j] = rest[j:, j] / np.sqrt(rest[j, j])
        rest[j:, j:] -= np.outer(columns[j:, j], columns[j:, j])
    return torch.from_numpy(columns.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [448, 700])  # the first is a multiple of 64
def test_large_matrices_are_factored_by_blocks_as_well_as_at_once(n: int, dtype: torch.dtype) -> None:
    X = torch.randn(n, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = (X @ X.T / 800 + 0.1 * torch.eye(n, dtype=torch.float64)).to(dtype)
    L = cholesky_factor(Dense(A, is_gram=True)).double()
    exact = extended_triangle(A)
    eps = torch.finfo(dtype).eps
    assert torch.equal(L, L.tril())
    # As far from the triangle of these entries as that of LAPACK in one piece, up to a factor.
    at_once = (torch.linalg.cholesky(A).double() - exact).abs().max()
    assert (L - exact).abs().max() <= 4 * (at_once + eps)
    assert (L @ L.T - A.double()).abs().max() <= 32 * eps
    v = torch.randn(3, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for explicit in (False, True):
        inverse = Cholesky(explicit).power(Dense(A, is_gram=True), -1)
        assert ((inverse @ v).double() @ A.double() - v.double()).abs().max() <= 200 * eps


@pytest.mark.parametrize("n", [200, 448, 700])
@pytest.mark.parametrize("shift", [0.5, torch.tensor(0.5)], ids=str)
def test_a_shift_is_added_on_the_way(n: int, shift: float | Tensor) -> None:
    X = torch.randn(n, n // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = X @ X.T / n  # singular
    kept = A.clone()
    L = cholesky_factor(Dense(A, is_gram=True), shift)
    shifted = A + 0.5 * torch.eye(n, dtype=torch.float64)
    assert torch.equal(A, kept) and torch.equal(L, L.tril())
    assert (L - torch.linalg.cholesky(shifted)).abs().max() <= 1e-13
    inverse = Cholesky().power(Shifted(Dense(A, is_gram=True), shift), -1).to_dense()
    assert (inverse @ shifted - torch.eye(n, dtype=torch.float64)).abs().max() <= 1e-12
    with pytest.raises(NotPositiveDefiniteError, match=r"smallest eigenvalue is -0\.1"):
        cholesky_factor(Dense(A, is_gram=True), -0.1)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        cholesky_factor(Dense(A, is_gram=True), torch.tensor(torch.inf))


@pytest.mark.parametrize("place", [3, 650])
def test_a_bad_pivot_in_any_block_is_refused(place: int) -> None:
    bad = torch.eye(700)
    bad[place, place] = -1
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue is -1"):
        Cholesky().power(Dense(bad, is_gram=True), -1)
    bad[place, place] = torch.nan
    with pytest.raises(NonFiniteError):
        Cholesky().power(Dense(bad, is_gram=True), -1)


@pytest.mark.parametrize("n", [8, 650])
def test_a_solve_can_be_differentiated_in_the_matrix(n: int) -> None:
    A = (2 * torch.eye(n, dtype=torch.float64) + 1 / n).requires_grad_()
    ones = torch.ones(n, dtype=torch.float64)
    (slope,) = torch.autograd.grad((Cholesky(explicit=False).power(Dense(A), -1) @ ones).sum(), A)
    x = torch.linalg.solve(A.detach(), ones)
    expected = -torch.outer(x, x)
    torch.testing.assert_close((slope + slope.mT) / 2, expected, rtol=1e-10, atol=1e-14)
