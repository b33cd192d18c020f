"""Spectral densities against the smoothed histogram of all eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import solvers
from solvers import Density, Function, NonFiniteError, NotSymmetricError
from solvers.estimates.probes import signs
from solvers.estimates.spectral_density import DensityMethod
from tests.solvers.counting import Counting, known_by_products
from tests.solvers.problems import normal, symmetric, with_spectrum

METHODS: tuple[DensityMethod, ...] = ("slq", "kpm")
each = pytest.mark.parametrize("method", METHODS)


def smoothed(values: np.ndarray, grid: Tensor, width: float) -> Tensor:
    """The mean of Gaussians around the eigenvalues, from the definition."""
    result = np.zeros(len(grid))
    for index, t in enumerate(grid.tolist()):
        result[index] = np.mean(np.exp(-(((t - values) / width) ** 2) / 2)) / (width * np.sqrt(2 * np.pi))
    return torch.from_numpy(result)


def problem(n: int = 250) -> tuple[Tensor, np.ndarray]:
    matrix = symmetric(n) / n**0.5
    return matrix, np.linalg.eigvalsh(matrix.numpy())


def assert_within_band(density: Density, truth: Tensor) -> None:
    inside = (density.density - truth).abs() <= 2 * density.stderr + 1e-9
    assert inside.double().mean() > 0.85  # 0.95 on average over runs; points of one run are not independent
    assert ((density.density - truth).abs() <= 6 * density.stderr + 1e-3 * truth.max()).all()


def test_slq_is_the_smoothed_density() -> None:
    matrix, values = problem()
    density = solvers.spectral_density(known_by_products(matrix), samples=30, width=0.1)
    assert density.width == 0.1
    assert_within_band(density, smoothed(values, density.grid, 0.1))
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=1e-3)
    assert density.grid.shape == density.density.shape == density.stderr.shape == (512,)
    assert float(density.stderr.max()) < 0.2 * float(density.density.max())


def test_kpm_is_the_smoothed_density() -> None:
    matrix, values = problem()
    density = solvers.spectral_density(known_by_products(matrix), "kpm", samples=30, steps=40)
    # Jackson's kernel is nearly a Gaussian of standard deviation width * sqrt(1 - t^2): compare in the middle.
    middle = density.grid.abs() < 0.3
    truth = smoothed(values, density.grid[middle], density.width)
    assert (density.density[middle] - truth).abs().max() < 3 * density.stderr[middle].max()
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=0.01)
    assert (density.density >= -1e-12).all(), "Jackson's kernel is positive"


def test_methods_agree() -> None:
    matrix, _ = problem()
    kpm = solvers.spectral_density(known_by_products(matrix), "kpm", samples=40, steps=30)
    slq = solvers.spectral_density(known_by_products(matrix), grid=kpm.grid, width=kpm.width, samples=40)
    middle = kpm.grid.abs() < 0.3
    error = torch.hypot(kpm.stderr, slq.stderr)[middle].max()
    assert (kpm.density - slq.density)[middle].abs().max() < 4 * error


def test_outliers_are_found() -> None:
    matrix = with_spectrum([*np.linspace(0, 1, 300).tolist(), 10.0, 20.0])
    density = solvers.spectral_density(known_by_products(matrix), samples=40, width=0.2, steps=60)
    for outlier in (10.0, 20.0):
        near = (density.grid - outlier).abs() < 1
        mass = float(torch.trapezoid(density.density[near], density.grid[near]))
        assert mass == pytest.approx(1 / 302, rel=0.6)
        peak = float(density.grid[near][density.density[near].argmax()])
        assert peak == pytest.approx(outlier, abs=0.1)


@each
def test_moments(method: DensityMethod) -> None:
    matrix, values = problem()
    moments = solvers.spectral_density(known_by_products(matrix), method, samples=40, steps=30).moments
    truth = torch.tensor([np.mean(values**p) for p in (1, 2, 3, 4)])
    assert ((moments.value - truth).abs() < 3 * moments.stderr).all()
    assert (moments.stderr < 0.3).all() and moments.samples == 40


def test_signs_are_independent() -> None:
    # Eight come from one draw: neither lags within and across draws nor places in a draw may show anything.
    z = signs(Function(lambda x: x, (4001,), dtype=torch.float64), 5, torch.Generator().manual_seed(1))
    assert z.shape == (5, 4001) and z.dtype == torch.float64 and set(z.unique().tolist()) == {-1.0, 1.0}
    flat = z.flatten()
    lags = torch.stack([flat[:-lag] @ flat[lag:] / (len(flat) - lag) ** 0.5 for lag in range(1, 70)])
    lanes = flat[: len(flat) // 64 * 64].reshape(-1, 64).sum(0) / (len(flat) // 64) ** 0.5
    assert lags.abs().max() < 4.5 and lanes.abs().max() < 4.5 and abs(flat.sum()) < 4.5 * len(flat) ** 0.5


def test_moments_are_those_of_the_same_vectors() -> None:
    # Both methods are exact for low moments, up to the vectors; kpm has drawn one for the bounds before.
    matrix, _ = problem()
    z = signs(known_by_products(matrix), 5, torch.Generator().manual_seed(0))
    expected = torch.stack([(z * (z @ torch.linalg.matrix_power(matrix, p))).sum() / z.numel() for p in (1, 2, 3, 4)])
    moments = solvers.spectral_density(known_by_products(matrix), samples=5).moments
    torch.testing.assert_close(moments.value, expected, rtol=1e-10, atol=1e-10)


@each
def test_products_are_counted(method: DensityMethod) -> None:
    counting = Counting(lambda x: x.roll(1, -1) + x.roll(-1, -1), 400)
    density = solvers.spectral_density(counting.op, method, samples=5, steps=20, batch_size=2)
    assert density.products == counting.vectors
    assert counting.largest <= 2 and density.samples == 5


@each
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale(method: DensityMethod, scale: float, dtype: torch.dtype) -> None:
    matrix = problem(80)[0].to(dtype)
    plain = solvers.spectral_density(known_by_products(matrix), method)
    scaled = solvers.spectral_density(known_by_products(matrix * scale), method)
    # Without reorthogonalisation rounding moves nodes, and kernels of a hundredth of the range magnify that.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(scaled.grid / scale, plain.grid, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scaled.density * scale, plain.density, rtol=tolerance, atol=tolerance)
    powers = torch.arange(1, 5, dtype=torch.float64)
    torch.testing.assert_close(scaled.moments.value / scale**powers, plain.moments.value, rtol=1e-3, atol=1e-3)


@each
def test_degenerate_spectra(method: DensityMethod) -> None:
    for n, value in ((1, 3.0), (30, 3.0), (30, 0.0), (1, -2.0)):
        op = known_by_products(value * torch.eye(n, dtype=torch.float64))
        density = solvers.spectral_density(op, method)
        torch.testing.assert_close(density.moments.value, torch.tensor([value**p for p in (1, 2, 3, 4)]).double())
        assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=0.01)
        peak = float(density.grid[density.density.argmax()])
        assert peak == pytest.approx(value, abs=max(0.01, abs(value) * 1e-3))


def test_singular_operator_has_its_weight_at_zero() -> None:
    root = normal(20, 200)
    op = known_by_products(root.mT @ root / 200)
    density = solvers.spectral_density(op, samples=40, width=0.01)
    near = density.grid.abs() < 0.05
    assert float(torch.trapezoid(density.density[near], density.grid[near])) == pytest.approx(0.9, abs=0.02)


@each
def test_grid_of_the_user(method: DensityMethod) -> None:
    matrix, _ = problem(60)
    grid = torch.linspace(-5, 5, 33)
    density = solvers.spectral_density(known_by_products(matrix), method, grid=grid)
    assert torch.equal(density.grid, grid.double())
    assert float(density.density[0]) == pytest.approx(0, abs=1e-12)


@each
def test_own_random_numbers(method: DensityMethod) -> None:
    op = known_by_products(problem(60)[0])
    before = torch.get_rng_state()
    first, second = solvers.spectral_density(op, method), solvers.spectral_density(op, method)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.density, second.density)
    other = solvers.spectral_density(op, method, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.moments.value, other.moments.value)


@each
def test_refusals(method: DensityMethod) -> None:
    matrix = problem(60)[0]
    bad = matrix.clone()
    bad[2, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"Lanczos on Function\(60x60\) met NaN or infinity"):
        solvers.spectral_density(known_by_products(bad), method)
    with pytest.raises(NotSymmetricError, match="symmetric=True"):
        solvers.spectral_density(known_by_products(matrix, symmetric=False), method)
    with pytest.raises(ValueError, match="is empty and has no spectrum"):
        solvers.spectral_density(known_by_products(matrix[:0, :0]), method)
    with pytest.raises(ValueError, match="samples is at least 1"):
        solvers.spectral_density(known_by_products(matrix), method, samples=0)
    with pytest.raises(ValueError, match="grid is at least 2"):
        solvers.spectral_density(known_by_products(matrix), method, grid=1)


def test_wrong_arguments() -> None:
    op = known_by_products(problem(10)[0])
    with pytest.raises(ValueError, match="method is one of slq, kpm"):
        solvers.spectral_density(op, "lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width is a positive number for method='slq'"):
        solvers.spectral_density(op, "kpm", width=0.1)
