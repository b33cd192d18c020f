"""The spectral density of a symmetric operator, with an error band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi, tan
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from solvers.estimates.estimate import Estimate, Mean
from solvers.estimates.lanczos import Quadrature, quadrature
from solvers.estimates.probes import default_batch, flat_product, norm, own_generator, require_symmetric, signs
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, flag, number, whole
from solvers.outcome.progress import progress_bar
from solvers.precision import without_autocast

DensityMethod = Literal["slq", "kpm"]
_MOMENTS = 4


@dataclass(frozen=True, eq=False)
class Density:
    r"""Spectral density :math:`\rho(t) = \frac1n \sum_i K_w(t - \lambda_i)`, smoothed by a kernel of width w.

    All numbers are float64.

    Attributes:
        grid: Points ``(g,)``, ascending, in units of the operator.
        density: Density at the points ``(g,)``; its integral is one.
        stderr: Its standard error at each point ``(g,)``: that of the mean over the random vectors, and for "slq" also
            what the last quarter of the steps changed. ``density +- 2 stderr`` is the error band: it holds the smoothed
            density in 95 % of runs at each point that the steps resolve, outliers included, for which it is as wide as
            the skewed estimate of one eigenvalue needs (three times the density for 4 vectors, 1.2 times for 10); in
            99 % at outliers that come in pairs.
        moments: Estimate ``(4,)`` of ``tr(A^p) / n`` for p = 1, ..., 4, before any smoothing.
        width: Width of the kernel, in units of the operator. Detail below it is not resolved.
        samples: Random vectors spent.
        products: Products spent.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    moments: Estimate
    width: float
    samples: int
    products: int


@without_autocast
def spectral_density(
    op: LinearOperator,
    method: DensityMethod = "slq",
    *,
    samples: int = 10,
    steps: int = 80,
    grid: int | Tensor = 512,
    width: float | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Density:
    r"""Spectral density from ``samples`` random vectors of ``steps`` products each.

    * "slq": Lanczos quadrature, smoothed by a Gaussian. Finds outliers exactly, wherever they are.
    * "kpm": Chebyshev moments with Jackson's kernel; ``2 steps`` moments. Smooth, needs no inner products beside those
      of the moments; the range of the spectrum comes from a short Lanczos run.

    >>> from solvers import Diagonal
    >>> density = spectral_density(Diagonal(torch.linspace(0, 2, 500, dtype=torch.float64)))
    >>> round(float(torch.trapezoid(density.density, density.grid)), 2)
    1.0

    Args:
        op: Symmetric operator.
        method: One of the above.
        samples: Random vectors; at least 2 for an error band. Around 10 do for large operators.
        steps: Products per vector.
        grid: Number of points, which then span the spectrum and its smoothing, or the points themselves ``(g,)``.
        width: Width of the kernel, in units of the operator. For "slq" the standard deviation of the Gaussian; None
            takes a hundredth of the range. For "kpm" it follows from the steps, about ``pi range / (4 steps)``.
        batch_size: Vectors per product; None takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; None draws the same ones each time.
        progress: True shows a progress bar, False never, None after a second.

    Raises:
        ValueError: If the operator is not square or empty, or an argument is out of range.
        NotSymmetricError: If the operator is not known to be symmetric.
        NonFiniteError: If a product holds NaN or infinity.

    References:
        Lin, Saad and Yang (2016), https://doi.org/10.1137/130934283; Weisse, Wellein, Alvermann and Fehske (2006),
        section II, https://arxiv.org/abs/cond-mat/0504627
    """
    require_symmetric(op, "spectral_density")
    if op.shape[1] == 0:
        raise ValueError(f"{op!r} is empty and has no spectrum.")
    choice("method", method, DensityMethod)
    whole("samples", samples)
    whole("steps", steps)
    number("width", width, optional=True)
    flag("progress", progress, optional=True)
    if width is not None and (method == "kpm" or not width > 0):
        raise ValueError(f"width is a positive number for method='slq', not {width} for {method!r}.")
    if isinstance(grid, Tensor):
        if grid.ndim != 1 or grid.is_complex() or not bool(torch.isfinite(grid).all()):
            raise ValueError(f"grid is a number of points or finite points (g,), not a tensor {tuple(grid.shape)}.")
    else:
        whole("grid", grid, low=2)
    batch, generator = default_batch(op, batch_size), own_generator(op, generator)
    parts = [min(batch, samples - done) for done in range(0, samples, batch)]
    with progress_bar(samples, f"spectral density ({method})", progress) as bar:
        match method:
            case "slq":
                return _slq(op, parts, steps, grid, width, generator, bar.update)
            case "kpm":
                return _kpm(op, parts, steps, grid, generator, bar.update)
    raise ValueError(f"method is one of {', '.join(get_args(DensityMethod))}, not {method!r}.")


def _slq(
    op: LinearOperator,
    parts: list[int],
    steps: int,
    grid: int | Tensor,
    width: float | None,
    generator: torch.Generator,
    update: Callable[[int], object],
) -> Density:
    product, rules = flat_product(op), []
    for count in parts:
        rules.append(quadrature(op, product, signs(op, count, generator), steps))
        update(count)
    products = sum(count * rule.steps for count, rule in zip(parts, rules, strict=True))
    return smooth(op, rules, grid, width, products)


def smooth(
    op: LinearOperator, rules: Sequence[Quadrature], grid: int | Tensor, width: float | None, products: int
) -> Density:
    """The density by quadratures that exist already, with their number of products.

    Args:
        op: The operator.
        rules: Quadratures of :func:`~solvers.estimates.lanczos.quadrature` from vectors of random signs.
        grid: As for :func:`spectral_density`.
        width: As for :func:`spectral_density`.
        products: Products that the rules have cost.
    """
    low = min(float(rule.nodes.min()) for rule in rules)
    high = max(float(rule.nodes.max()) for rule in rules)
    sigma = _extent(low, high) / 100 if width is None else width
    points = _grid(grid, low - 4 * sigma, high + 4 * sigma, op)

    def kernel(theta: Tensor) -> Tensor:
        return torch.exp(-(((points - theta.unsqueeze(-1)) / sigma) ** 2) / 2) / (sigma * (2 * pi) ** 0.5)

    curve, change, moments = Mean(), Mean(), Mean()
    for rule in rules:
        values, changes = rule.apply(kernel)
        curve.add(values)
        change.add(changes[1])
        moments.add(_moments(rule))
    stderr = torch.hypot(_skewed(curve, op.shape[1] * sigma), change.value.abs())
    return _density(points, curve.value, stderr, moments, sigma, products)


def _skewed(curve: Mean, scale: float | Tensor) -> Tensor:
    r"""Standard errors of a density, at least those that few eigenvalues under the kernel have.

    An eigenvector's share of a random vector is like a squared normal number, so the estimate from m vectors, where the
    kernel sees :math:`\nu` eigenvalues, is like :math:`\chi^2_k / k` times the truth, with :math:`k = \nu m`. For an
    outlier that is skewed: often far too low, with a sample variance that is as low. So where
    :math:`\nu \approx 2 \sqrt\pi\, n w \rho` (one at least) makes for a wider band, that one is taken.

    Args:
        curve: The mean over the vectors.
        scale: The number of unknowns n times the width w of the kernel.
    """
    found = (2 * pi**0.5 * scale * curve.value).clamp(min=1)
    return torch.maximum(curve.stderr, _relative_error(found * curve.count).to(curve.value) * curve.value)


def _relative_error(k: Tensor) -> Tensor:
    r"""The e for which :math:`\chi^2_k / k`, plus or minus 2 e times itself, misses one in 5 % of draws."""
    from scipy.special import chdtr  # heavy, and needed by estimates alone

    freedom = k.cpu().numpy()
    low, high = np.zeros_like(freedom), np.full_like(freedom, 1e3)
    for _ in range(50):
        e = (low + high) / 2
        below = chdtr(freedom, freedom / (1 + 2 * e))
        with np.errstate(divide="ignore"):
            above = np.where(2 * e < 1, 1 - chdtr(freedom, freedom / np.where(2 * e < 1, 1 - 2 * e, 1)), 0)
        missed = below + above > 0.05
        low, high = np.where(missed, e, low), np.where(missed, high, e)
    return torch.from_numpy(high)


def _moments(rule: Quadrature) -> Tensor:
    powers = torch.arange(1, _MOMENTS + 1, device=rule.nodes.device)
    return rule.apply(lambda theta: theta.unsqueeze(-1) ** powers)[0]


def _kpm(
    op: LinearOperator,
    parts: list[int],
    steps: int,
    grid: int | Tensor,
    generator: torch.Generator,
    update: Callable[[int], object],
) -> Density:
    product = flat_product(op)
    low, high, spent = _bounds(op, generator)
    centre, half = (low + high) / 2, (high - low) / 2
    points = _grid(grid, low, high, op)
    degree = 2 * steps
    t = (points - centre) / half
    inside = t.abs() < 1
    angle = torch.arccos(t.clamp(-1, 1))
    k = torch.arange(degree + 1, dtype=torch.float64, device=op.device)
    # Jackson's kernel: the positive one of least width
    a = pi / (degree + 2)
    jackson = ((degree + 2 - k) * torch.cos(a * k) + torch.sin(a * k) / tan(a)) / (degree + 2)
    weights = jackson * torch.where(k == 0, 1, 2)
    series = weights * torch.cos(k * angle.unsqueeze(1))  # (g, degree + 1)
    outer = torch.where(inside, 1 / (pi * half * (1 - t.square()).clamp(min=1e-12).sqrt()), 0)
    # Monomials of the operator by Chebyshev polynomials of the scaled one, exactly
    table = np.zeros((_MOMENTS, degree + 1))
    for p in range(1, min(_MOMENTS, degree) + 1):
        polynomial = np.polynomial.Polynomial([centre, half]) ** p
        table[p - 1, : p + 1] = np.polynomial.chebyshev.poly2cheb(polynomial.coef)
    to_moments = torch.from_numpy(table).to(op.device)

    curve, moments = Mean(), Mean()
    for count in parts:
        chebyshev = _chebyshev(product, signs(op, count, generator), centre, half, steps)  # (count, degree + 1)
        curve.add(outer * (chebyshev @ series.mT))
        moments.add(chebyshev @ to_moments.mT)
        update(count)
    products = spent + sum(parts) * steps
    kernel = pi * half / degree * (1 - t.square()).clamp(min=0).sqrt()  # the kernel's width, less towards the ends
    return _density(points, curve.value, _skewed(curve, op.shape[1] * kernel), moments, pi * half / degree, products)


def _chebyshev(product: Callable[[Tensor], Tensor], z: Tensor, centre: float, half: float, steps: int) -> Tensor:
    """``z^T T_k(B) z / z^T z`` for k = 0, ..., 2 steps and the scaled operator B: two moments for each product."""
    z = z / norm(z).to(z.dtype).unsqueeze(1)
    before, now = z, (product(z) - centre * z) / half
    first = _dot(z, now)
    moments = [torch.ones_like(first), first]
    for _ in range(1, steps):
        # T_2k = 2 T_k^2 - 1 and T_(2k+1) = 2 T_k T_(k+1) - T_1
        moments.append(2 * _dot(now, now) - 1)
        before, now = now, 2 * (product(now) - centre * now) / half - before
        moments.append(2 * _dot(before, now) - first)
    moments.append(2 * _dot(now, now) - 1)
    return torch.stack(moments, 1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, dtype=torch.float64)


def _bounds(op: LinearOperator, generator: torch.Generator) -> tuple[float, float, int]:
    """An interval that holds the spectrum: extreme Ritz values of a short Lanczos run, and a margin."""
    rule = quadrature(op, flat_product(op), signs(op, 1, generator), 30)
    low, high = float(rule.nodes.min()), float(rule.nodes.max())
    # What the last steps still moved the ends, and a percent.
    coarse = rule.coarser[0][0]
    moved = max(high - float(coarse.max()), float(coarse.min()) - low, 0.0)
    margin = 2 * moved + 0.01 * _extent(low, high)
    return low - margin, high + margin, rule.steps


def _extent(low: float, high: float) -> float:
    """Width of a range; for a single point a thousandth of its value, or one at zero."""
    return max(high - low, 1e-3 * max(abs(low), abs(high))) or 1.0


def _grid(grid: int | Tensor, low: float, high: float, op: LinearOperator) -> Tensor:
    if isinstance(grid, Tensor):
        return grid.to(op.device, torch.float64)
    return torch.linspace(low, high, grid, dtype=torch.float64, device=op.device)


def _density(points: Tensor, curve: Tensor, stderr: Tensor, moments: Mean, width: float, products: int) -> Density:
    count = moments.count
    zero = torch.zeros_like(moments.value)
    estimate = Estimate(moments.value, moments.stderr, count, products, zero)
    return Density(points, curve, stderr, estimate, width, count, products)
