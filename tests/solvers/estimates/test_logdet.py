"""The log-determinant: exact by structure, stochastic Lanczos quadrature with both of its errors elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    Dense,
    Diagonal,
    FactoredTikhonov,
    Kronecker,
    LowRank,
    NotConvergedWarning,
    NotPositiveDefiniteError,
    NotSymmetricError,
    SingularMatrixError,
)
from tests.solvers.counting import Counting, known_by_products
from tests.solvers.problems import normal, positive, symmetric, with_spectrum


def true_logdet(matrix: Tensor) -> float:
    return float(np.linalg.slogdet(matrix.double().numpy())[1])


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_damped_structures_are_exact(lam: float | Tensor) -> None:
    for op in (Dense(positive(5)), Kronecker(positive(3), positive(2)), LowRank(normal(3, 7)), Diagonal(torch.ones(4))):
        op = op.to(torch.float64)
        result = solvers.logdet(op, damping=lam)
        damped = op.to_dense() + 0.3 * torch.eye(op.shape[0], dtype=torch.float64)
        assert float(result.value) == pytest.approx(true_logdet(damped), rel=1e-11)
        assert result.samples == 0 and float(result.stderr) == 0


def test_damping_may_be_factored() -> None:
    op, damping = Kronecker(positive(3), positive(2)), FactoredTikhonov(0.3)
    truth = true_logdet(damping(op).to_dense())
    assert float(solvers.logdet(op, damping).value) == pytest.approx(truth, rel=1e-11)


def test_sum_of_kronecker_products_is_estimated() -> None:
    op = Kronecker(positive(12), positive(10)) + Kronecker(positive(12, seed=1), positive(10, seed=2))
    result = solvers.logdet(op, 0.1, samples=40)
    truth = true_logdet(op.to_dense() + 0.1 * torch.eye(120, dtype=torch.float64))
    assert result.samples == 40
    assert abs(float(result.value) - truth) < 3 * float(result.stderr) < 0.2 * abs(truth)


def test_few_unknowns_are_exact() -> None:
    matrix = positive(20)
    result = solvers.logdet(known_by_products(matrix), 0.5)
    assert float(result.value) == pytest.approx(true_logdet(matrix + 0.5 * torch.eye(20)), rel=1e-12)
    assert (result.samples, result.products, float(result.stderr)) == (0, 20, 0)


def test_products_are_counted_and_steps_end_early() -> None:
    counting = Counting(lambda x: 3 * x + x.roll(1, -1) + x.roll(-1, -1), 500)
    result = solvers.logdet(counting.op, samples=20, steps=200, batch_size=8)
    assert result.products == counting.vectors < 20 * 30
    assert counting.largest <= 8


@pytest.mark.parametrize("condition", [4, 6, 8])
def test_quadrature_error_is_reported(condition: int) -> None:
    # A few steps leave the quadrature far from done, by much more than the spread of samples shows.
    matrix = with_spectrum(torch.logspace(-condition, 0, 300).tolist())
    truth = true_logdet(matrix)
    errors = []
    for steps in (8, 30, 100):
        result = solvers.logdet(known_by_products(matrix), samples=30, steps=steps)
        errors.append(float(result.stderr))
        assert abs(float(result.value) - truth) < 2 * errors[-1] < 8 * abs(truth)
        assert float(result.systematic) <= errors[-1]
    assert errors[2] < 0.5 * errors[0]


def test_too_few_steps_miss_the_tolerance() -> None:
    matrix = with_spectrum(torch.logspace(-8, 0, 300).tolist())
    with pytest.warns(NotConvergedWarning, match="Allow more max_samples or steps, more damping"):
        solvers.logdet(known_by_products(matrix), samples=10, steps=8, rtol=0.01, max_samples=100)


def test_tolerance_is_reached() -> None:
    matrix = positive(200)
    result = solvers.logdet(known_by_products(matrix), atol=1.0)
    assert float(result.stderr) <= 1.0
    assert abs(float(result.value) - true_logdet(matrix)) < 3


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_repeated_eigenvalues(lam: float) -> None:
    matrix = with_spectrum([1.0] * 30 + [2.0] * 30)
    result = solvers.logdet(known_by_products(matrix), lam, "slq", samples=200)
    truth = 30 * np.log(1 + lam) + 30 * np.log(2 + lam)
    assert abs(float(result.value) - truth) < 3 * float(result.stderr)
    multiple = solvers.logdet(known_by_products(3 * torch.eye(60, dtype=torch.float64)), 0.0, "slq")
    assert float(multiple.value) == pytest.approx(60 * np.log(3), rel=1e-13)
    assert float(multiple.stderr) < 1e-10


def test_indefinite_and_singular_are_refused() -> None:
    with pytest.raises(NotPositiveDefiniteError, match=r"Function\(60x60\).*node -.*more damping"):
        solvers.logdet(known_by_products(symmetric(60)))
    root = normal(5, 60)
    with pytest.raises(NotPositiveDefiniteError, match=r"not positive definite in torch\.float64"):
        solvers.logdet(known_by_products(root.mT @ root))
    with pytest.raises(SingularMatrixError):
        solvers.logdet(Dense(-positive(3)))


def test_asymmetric_is_refused() -> None:
    with pytest.raises(NotSymmetricError, match="logdet needs a symmetric operator"):
        solvers.logdet(known_by_products(positive(60), symmetric=False))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="steps is at least 1"):
        solvers.logdet(known_by_products(positive(60)), steps=0)
    with pytest.raises(ValueError, match="method is one of slq or None"):
        solvers.logdet(known_by_products(positive(60)), method="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0"):
        solvers.logdet(known_by_products(positive(60)), -1.0)
