"""The numbers that several reports share, and their differences with combined errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import hypot

import torch

from curvature.reports.results import Eigenvalue, Findings, Matrix, Number

#: Differences of exact numbers that rounding explains, in units of the last place of the data type.
_PLACES = 100


@dataclass(frozen=True)
class Measured:
    """A number of one report.

    Attributes:
        value: The number.
        error: Its standard error, or a bound; 0 for exact numbers.
        bound: Whether the error is a bound, as that of an eigenvalue is.
        converged: False for an eigenvalue that has not converged, or that may have larger ones beside it.
    """

    value: float
    error: float = 0.0
    bound: bool = False
    converged: bool = True


@dataclass(frozen=True)
class Difference:
    r"""The difference of a number from that of the first report.

    Attributes:
        value: The difference.
        error: For standard errors :math:`\sqrt{e_1^2 + e_2^2}`, for bounds :math:`e_1 + e_2`.
        bound: Whether the error is a bound.
        ratio: The number over that of the first report; None where that may be zero.
        ratio_error: Of the ratio r, to first order: :math:`|r|` times the relative errors, combined in the same way.
        rounding: Differences up to this say nothing.
        converged: Whether both numbers are what they are called; if not, :attr:`differs` is None.
    """

    value: float
    error: float
    bound: bool
    ratio: float | None
    ratio_error: float | None
    rounding: float
    converged: bool

    @property
    def in_errors(self) -> float | None:
        """The difference in units of its error; None for exact numbers."""
        return self.value / self.error if self.error > 0 else None

    @property
    def differs(self) -> bool | None:
        """Whether the numbers differ by more than two standard errors, or more than their bounds allow."""
        if not self.converged:
            return None
        return abs(self.value) > (1 if self.bound else 2) * self.error + self.rounding


@dataclass(frozen=True)
class Quantity:
    """A number that at least two reports have.

    Attributes:
        name: What it is, such as ``"trace"`` or ``"eigenvalue 1"``.
        section: The section of the report that it comes from.
        matrix: ``"hessian"`` or ``"ggn"``; None where it belongs to neither.
        layer: Name of the layer; None for the whole model.
        values: One for each report; None where it lacks the number.
        differences: From the first report, for each report; None for the first, and where one of both is missing.
    """

    name: str
    section: str
    matrix: Matrix | None
    layer: str | None
    values: tuple[Measured | None, ...]
    differences: tuple[Difference | None, ...]


def difference(first: Measured, other: Measured, eps: float) -> Difference:
    """The difference of two numbers.

    Args:
        first: That it is counted from.
        other: The other one.
        eps: Spacing of the numbers at 1 of the coarser data type.
    """
    bound = first.bound or other.bound
    combined = _sum if bound else hypot
    ratio = error = None
    if abs(first.value) > (1 if bound else 2) * first.error and first.value != 0:
        ratio = other.value / first.value
        # d(b / a) = db / a - b da / a^2
        error = combined(other.error / abs(first.value), ratio * first.error / abs(first.value))
    return Difference(
        other.value - first.value,
        combined(first.error, other.error),
        bound,
        ratio,
        error,
        _PLACES * eps * max(abs(first.value), abs(other.value)),
        first.converged and other.converged,
    )


def _sum(a: float, b: float) -> float:
    return abs(a) + abs(b)


def quantities(reports: Sequence[Findings], same_damping: bool, same_k: bool) -> tuple[Quantity, ...]:
    """The numbers that at least two of the reports have, in the order of a report.

    Args:
        reports: The reports.
        same_damping: Whether numbers that depend on the damping may be compared.
        same_k: Whether the share of the gradient along the largest eigenvalues may be.
    """
    rows: dict[tuple[str, str, Matrix | None, str | None], list[Measured | None]] = {}
    for i, report in enumerate(reports):
        for key, measured in _numbers(report, same_damping, same_k):
            rows.setdefault(key, [None] * len(reports))[i] = measured
    eps = max(map(_eps, reports))
    found = []
    for (section, name, matrix, layer), values in rows.items():
        if sum(value is not None for value in values) < 2:
            continue
        first = values[0]
        differences = (
            None if i == 0 or first is None or value is None else difference(first, value, eps)
            for i, value in enumerate(values)
        )
        found.append(Quantity(name, section, matrix, layer, tuple(values), tuple(differences)))
    order = list(_ORDER)
    return tuple(sorted(found, key=lambda quantity: order.index(quantity.section)))


_ORDER = ("loss", "eigenvalues", "trace", "density", "noise", "distances", "layers")

_Named = tuple[tuple[str, str, Matrix | None, str | None], Measured]


def _eps(report: Findings) -> float:
    """Spacing of the numbers at 1 in the data type of a report; float32 where it does not say."""
    if report.setting is None:
        return torch.finfo(torch.float32).eps
    return max(torch.finfo(getattr(torch, name)).eps for name in report.setting.dtype.split(", "))


def _numbers(report: Findings, same_damping: bool, same_k: bool) -> Iterator[_Named]:
    """The numbers of a report, by section, name, matrix and layer."""
    yield ("loss", "loss", None, None), Measured(report.loss.value)
    yield ("loss", "gradient norm", None, None), Measured(report.loss.gradient_norm)
    for m, found in report.eigenvalues.items():
        yield from _ranked(m, "eigenvalue", found.largest, found.complete)
        yield from _ranked(m, "lowest", found.smallest, found.smallest_complete)
        if found.alignment is not None and same_k:
            aligned = Measured(found.alignment.value, found.alignment.error, bound=True)
            yield ("eigenvalues", f"gradient in the top {report.k} directions", m, None), aligned
    for m, sums in report.traces.items():
        yield ("trace", "trace", m, None), _estimate(sums.trace)
        yield ("trace", "Frobenius norm", m, None), _estimate(sums.frobenius)
        for layer, number in sums.layers.items():
            yield ("layers", "trace", m, layer), _estimate(number)
    for m, curve in report.densities.items():
        if same_damping and curve.effective_dimension is not None:
            yield ("density", "effective dimension", m, None), _estimate(curve.effective_dimension)
        if same_damping and curve.condition is not None:
            low, high = curve.condition.low, curve.condition.high
            yield ("density", "condition", m, None), Measured((low + high) / 2, (high - low) / 2, bound=True)
    if report.noise is not None:
        yield ("noise", "squared norm of the expected gradient", None, None), _estimate(report.noise.squared_gradient)
        yield ("noise", "variance of one example's gradient", None, None), _estimate(report.noise.covariance_trace)
        if report.noise.scale is not None:
            yield ("noise", "noise scale", None, None), _estimate(report.noise.scale)
    if report.distances is not None:
        for structure, distance in report.distances.structures.items():
            yield ("distances", f"distance of {structure}", "ggn", None), _estimate(distance.whole)
            for layer, number in distance.layers.items():
                yield ("layers", f"distance of {structure}", "ggn", layer), _estimate(number)
    for m, tops in report.layer_eigenvalues.items():
        for layer, pair in tops.largest.items():
            yield ("layers", "largest eigenvalue", m, layer), _eigenvalue(pair, True)


def _ranked(matrix: Matrix, name: str, pairs: Iterable[Eigenvalue], complete: bool) -> Iterator[_Named]:
    for rank, pair in enumerate(pairs, start=1):
        yield ("eigenvalues", f"{name} {rank}", matrix, None), _eigenvalue(pair, complete)


def _eigenvalue(pair: Eigenvalue, complete: bool) -> Measured:
    return Measured(pair.value, pair.residual, bound=True, converged=pair.converged and complete)


def _estimate(x: Number) -> Measured:
    return Measured(x.value, x.error)
