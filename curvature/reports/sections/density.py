"""The spectral density, and the numbers that follow from the same products."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from curvature.reports.results import Condition, DensityResult, Matrix, Number
from curvature.reports.sections.study import Study
from solvers.estimates.estimate import Mean
from solvers.estimates.lanczos import Quadrature, quadrature, remaining
from solvers.estimates.probes import flat_product, signs
from solvers.estimates.spectral_density import smooth

_SAMPLES = (4, 12)
_STEPS = (10, 80)
_POINTS = 512


def products(study: Study, matrix: Matrix) -> tuple[int, int]:
    """Products at least and as a rule: random vectors times steps."""
    steps = [min(number, study.size) for number in _STEPS]
    return _SAMPLES[0] * steps[0], _SAMPLES[1] * steps[1]


def density(study: Study, matrix: Matrix, allotted: float) -> DensityResult:
    r"""Spectral density by Lanczos quadrature; for a GGN also the effective dimension and the condition.

    A quadrature from a random vector z of signs estimates every :math:`\operatorname{tr} f(C)`: here f is a smoothed
    delta, and :math:`f(s) = s / (s + \lambda)`.

    References:
        Lin, Saad and Yang (2016), https://doi.org/10.1137/130934283; MacKay (1992), section 4, for the effective
        dimension.
    """
    if matrix in study.dense:
        return _of_dense(study, matrix)
    op = study.counted(study.operator(matrix))
    product, generator = flat_product(op), study.generator("density", matrix)
    affordable = allotted / study.block_rates[matrix]
    least, most = _SAMPLES
    steps = int(min(_STEPS[1], study.size, max(_STEPS[0], affordable / least)))
    rules: list[Quadrature] = []
    begun, spent = study.budget.spent, 0

    def late(_: Quadrature) -> bool:
        return study.budget.spent - begun > allotted

    while len(rules) * least < most:  # groups of them share their passes over the data
        before = study.budget.spent
        rules.append(quadrature(op, product, signs(op, least, generator), steps, late))
        spent += least * rules[-1].steps
        now = study.budget.spent
        if now - begun + (now - before) > allotted:
            break
    smoothed = smooth(op, rules, _POINTS, None, spent)
    effective = condition = None
    if matrix == "ggn":
        effective = _effective_dimension(study, rules)
        condition = _condition(study, matrix, torch.cat([rule.nodes[rule.weights > 0] for rule in rules]), False)
    return DensityResult(
        tuple(smoothed.grid.tolist()),
        tuple(smoothed.density.tolist()),
        tuple(smoothed.stderr.tolist()),
        smoothed.width,
        least * len(rules),
        effective,
        study.damping,
        condition,
        spent,
    )


def _effective_dimension(study: Study, rules: list[Quadrature]) -> Number:
    """Mean over the random vectors; its error includes the truncation of the steps."""

    def share(eigenvalues: Tensor) -> Tensor:
        positive = eigenvalues.clamp(min=0)  # those of a GGN are, up to rounding
        return positive / (positive + study.damping)

    values, changes = Mean(), Mean()
    for rule in rules:
        value, change = rule.apply(share)
        values.add(study.size * value)
        changes.add(study.size * change.mT)
    error = torch.hypot(values.stderr, remaining(changes.value))
    return Number(float(values.value), float(error), values.count)


def _condition(study: Study, matrix: Matrix, nodes: Tensor, exact: bool) -> Condition:
    """Bounds: Ritz values lie within the spectrum, and the smallest eigenvalue of a GGN is at least zero."""
    low, high, lam = max(0.0, float(nodes.min())), float(nodes.max()), study.damping
    if matrix in study.eigenvalues:
        top = study.eigenvalues[matrix].largest[0]
        high = max(high, top.value)
        above = max(high, top.value + top.residual)
    else:
        above = high
    lower = (high + lam) / (low + lam)
    return Condition(lower, lower if exact else (above + lam) / lam, lam)


def _of_dense(study: Study, matrix: Matrix) -> DensityResult:
    values = study.spectrum[matrix][0]
    low, high = float(values[0]), float(values[-1])
    width = (max(high - low, 1e-3 * max(abs(low), abs(high))) or 1.0) / 100
    grid = torch.linspace(low - 4 * width, high + 4 * width, _POINTS, dtype=torch.float64, device=values.device)
    kernel = torch.exp(-(((grid.unsqueeze(1) - values) / width) ** 2) / 2) / (width * (2 * pi) ** 0.5)
    effective = condition = None
    if matrix == "ggn":
        positive = values.clamp(min=0)
        effective = Number(float((positive / (positive + study.damping)).sum()))
        condition = _condition(study, matrix, values, True)
    return DensityResult(
        tuple(grid.tolist()),
        tuple(kernel.mean(1).tolist()),
        (0.0,) * _POINTS,
        width,
        0,
        effective,
        study.damping,
        condition,
        study.size,
    )
