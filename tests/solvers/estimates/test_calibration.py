"""Error bars mean what they say: the truth lies within two standard errors in 93 to 97 % of seeded runs.

A thousand runs, so that the share itself is known to 0.7 % and the bounds are those of the method, not of the seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import solvers
from solvers.estimates.diagonal import DiagonalMethod
from solvers.estimates.spectral_density import DensityMethod
from solvers.estimates.trace import TraceMethod
from tests.solvers.counting import known_by_products
from tests.solvers.problems import positive, symmetric, with_spectrum

RUNS = 1000
long = partial(pytest.param, marks=pytest.mark.long)


def coverage(run: Callable[[torch.Generator], tuple[Tensor, Tensor]], truth: Tensor, runs: int = RUNS) -> Tensor:
    """Share of runs with the truth within two standard errors, entry by entry."""
    hits = []
    for seed in range(runs):
        value, stderr = run(torch.Generator().manual_seed(seed))
        hits.append((value - truth).abs() <= 2 * stderr)
    return torch.stack(hits).double().mean(0)


def spectrum(kind: str) -> Tensor:
    n = 100
    return {
        "flat": with_spectrum(np.linspace(1, 3, n).tolist()),
        "indefinite": symmetric(n),
        "slow": with_spectrum([1 / (1 + i) for i in range(n)]),
    }[kind]


CASES = [
    ("hutchinson", 6, "flat"),
    ("hutchinson", 6, "indefinite"),
    ("hutchinson", 60, "slow"),
    ("hutch++", 30, "flat"),
    ("hutch++", 60, "indefinite"),
    ("hutch++", 60, "slow"),
    ("xtrace", 40, "indefinite"),
]


@pytest.mark.parametrize(("method", "samples", "kind"), CASES)
def test_trace(method: TraceMethod, samples: int, kind: str) -> None:
    matrix = spectrum(kind)
    op = known_by_products(matrix)

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        estimate = solvers.trace(op, method, samples=samples, generator=generator)
        return estimate.value, estimate.stderr

    assert 0.93 <= float(coverage(run, matrix.diagonal().sum())) <= 0.97


def test_xtrace_where_few_directions_are_left() -> None:
    # What the basis leaves is skewed here, which no standard error shows; taken for independent, its estimates would
    # cover 87 %.
    matrix = spectrum("slow")
    op = known_by_products(matrix)

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        estimate = solvers.trace(op, "xtrace", samples=40, generator=generator)
        return estimate.value, estimate.stderr

    assert 0.91 <= float(coverage(run, matrix.diagonal().sum())) <= 0.97


def test_trace_that_stops_on_its_error() -> None:
    matrix = spectrum("indefinite")
    op = known_by_products(matrix)
    atol = 0.2 * float(torch.linalg.matrix_norm(matrix))  # takes some fifty samples

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        estimate = solvers.trace(op, "hutchinson", samples=10, atol=atol, generator=generator)
        return estimate.value, estimate.stderr

    assert 0.93 <= float(coverage(run, matrix.diagonal().sum())) <= 0.97


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonal(method: DiagonalMethod) -> None:
    matrix = spectrum("slow")
    op = known_by_products(matrix)

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        estimate = solvers.diagonal(op, method, samples=30, generator=generator)
        return estimate.value, estimate.stderr

    assert 0.93 <= float(coverage(run, matrix.diagonal()).mean()) <= 0.97


def test_frobenius_norm() -> None:
    matrix = spectrum("flat")
    op = known_by_products(matrix)

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        estimate = solvers.frobenius_norm(op, samples=20, generator=generator)
        return estimate.value, estimate.stderr

    assert 0.93 <= float(coverage(run, (matrix**2).sum().sqrt())) <= 0.97


@pytest.mark.parametrize("samples", [8, long(20)])
def test_logdet(samples: int) -> None:
    matrix = positive(100)
    op = known_by_products(matrix)

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        estimate = solvers.logdet(op, samples=samples, generator=generator)
        return estimate.value, estimate.stderr

    truth = torch.from_numpy(np.asarray(np.linalg.slogdet(matrix.numpy())[1]))
    assert 0.93 <= float(coverage(run, truth)) <= 0.97


@pytest.mark.parametrize("method", ["slq", long("kpm")])
def test_moments_of_the_density(method: DensityMethod) -> None:
    matrix = symmetric(60)
    op, values = known_by_products(matrix), np.linalg.eigvalsh(matrix.numpy())

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        density = solvers.spectral_density(op, method, samples=10, steps=6, grid=2, generator=generator)
        return density.moments.value, density.moments.stderr

    truth = torch.tensor([np.mean(values**p) for p in (1, 2, 3, 4)])
    covered = coverage(run, truth)
    assert ((covered >= 0.93) & (covered <= 0.97)).all(), covered


OUTLIERS = {
    "simple": [4.0, 6.0, 8.0, 10.0],
    "in pairs": [4.0, 4.0, 9.0, 9.0],
    "of both signs": [-5.0, 3.0, 8.0],
}


@pytest.mark.parametrize(
    ("method", "kind", "samples"),
    [
        ("slq", "simple", 4),
        *(long("slq", "simple", samples) for samples in (2, 10)),
        ("slq", "in pairs", 4),
        long("slq", "of both signs", 4),
        long("kpm", "simple", 4),
        ("kpm", "of both signs", 10),
    ],
)
def test_band_of_a_density_at_outliers(method: DensityMethod, kind: str, samples: int) -> None:
    # What a vector of random signs has of one eigenvector is like a squared normal number: far from normal.
    outliers = OUTLIERS[kind]
    values = outliers + torch.linspace(0, 0.2, 60 - len(outliers)).tolist()
    op = known_by_products(with_spectrum(values))
    grid = torch.tensor(sorted(set(outliers)), dtype=torch.float64)
    if method == "slq":
        scaled = (grid.unsqueeze(1) - torch.tensor(values, dtype=torch.float64)) / 0.1
        truth = torch.exp(-(scaled**2) / 2).sum(1) / (60 * 0.1 * (2 * torch.pi) ** 0.5)
    else:  # random signs are exact for a diagonal matrix
        exact = known_by_products(torch.tensor(values, dtype=torch.float64).diag())
        truth = solvers.spectral_density(exact, "kpm", samples=1, steps=30, grid=grid).density

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        width = 0.1 if method == "slq" else None
        density = solvers.spectral_density(
            op, method, samples=samples, steps=30, grid=grid, width=width, generator=generator
        )
        return density.density, density.stderr + 1e-5 * truth  # the range of "kpm" is not quite the same

    covered = coverage(run, truth, 300)
    # 300 runs know a share of 95 % to 1.3 %; pairs are covered more often, as is said.
    assert (covered >= 0.91).all() and float(covered.mean()) >= 0.935, covered
    if kind == "simple":
        assert float(covered.mean()) <= 0.98, covered


def test_band_of_a_density_in_the_bulk() -> None:
    values = torch.linspace(0, 1, 150, dtype=torch.float64)
    op = known_by_products(with_spectrum(values.tolist()))
    grid = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    truth = torch.exp(-(((grid.unsqueeze(1) - values) / 0.05) ** 2) / 2).mean(1) / (0.05 * (2 * torch.pi) ** 0.5)

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        density = solvers.spectral_density(op, samples=8, steps=60, grid=grid, width=0.05, generator=generator)
        return density.density, density.stderr

    assert 0.94 <= float(coverage(run, truth, 150).mean()) <= 0.995


@pytest.mark.parametrize(("samples", "low", "high"), [(10, 0.84, 0.91), (100, 0.93, 0.97)])
@pytest.mark.parametrize("estimate", [solvers.trace, solvers.frobenius_norm, solvers.logdet])
def test_few_samples_of_what_one_eigenvalue_makes_up_cover_as_little_as_is_said(
    estimate: Callable[..., solvers.Estimate], samples: int, low: float, high: float
) -> None:
    matrix = with_spectrum([100.0] + [1.0] * 59)
    op = known_by_products(matrix)
    options: dict[str, object] = {"samples": samples}
    truth = matrix.diagonal().sum()
    if estimate is solvers.trace:
        options["method"] = "hutchinson"
    elif estimate is solvers.frobenius_norm:
        truth = (matrix**2).sum().sqrt()
    else:
        options["method"] = "slq"
        truth = torch.tensor(100.0, dtype=torch.float64).log()

    def run(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        found = estimate(op, generator=generator, **options)
        return found.value, found.stderr

    assert low <= float(coverage(run, truth, 400)) <= high
