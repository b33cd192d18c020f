"""A line search for the strong Wolfe conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

_FARTHER = 10.0  # a step that is too short grows by this factor at most
_MARGIN = 0.1  # a guess keeps this share of a bracket from its ends


class Point(NamedTuple):
    """A step along the line, the value there and its derivative along the line."""

    step: float
    value: float
    slope: float


def strong_wolfe(
    evaluate: Callable[[float], tuple[float, float]],
    value: float,
    slope: float,
    start: float,
    *,
    decrease: float = 1e-4,
    curvature: float = 0.9,
    noise: float = 0.0,
    resolution: float = 0.0,
    evaluations: int = 25,
) -> float | None:
    r"""A step :math:`\alpha` along a direction of descent that meets the strong Wolfe conditions.

    .. math:: \phi(\alpha) \le \phi(0) + c_1 \alpha \phi'(0), \qquad |\phi'(\alpha)| \le c_2 |\phi'(0)|

    A bracket is found by longer and longer steps, and narrowed by the minimisers of cubics through the values and
    slopes at its ends. Values that are not finite count as too large.

    Args:
        evaluate: Step to value and slope.
        value: :math:`\phi(0)`.
        slope: :math:`\phi'(0)`, negative.
        start: The step that is tried first.
        decrease: :math:`c_1`.
        curvature: :math:`c_2`, above :math:`c_1` and below 1; the smaller, the more exact the search.
        noise: Differences of values below this are rounding errors and do not count against a step.
        resolution: Steps that differ by less cannot be told apart.
        evaluations: At most.

    Returns:
        The step; where the evaluations did not suffice, the best one that met the first condition, which is the one
        evaluated last or before; ``None`` if there is none.

    References:
        Nocedal and Wright (2006), algorithms 3.5 and 3.6; equation 3.59 (cubics)
    """
    origin = Point(0.0, value, slope)
    count = 0

    def look(step: float) -> Point:
        nonlocal count
        count += 1
        there = Point(step, *evaluate(step))
        return there if math.isfinite(there.value + there.slope) else Point(step, math.inf, math.nan)

    def too_high(there: Point, best: Point) -> bool:
        return there.value > value + decrease * there.step * slope + noise or (
            best.step > 0 and there.value >= best.value + noise
        )

    def flat(there: Point) -> bool:
        return abs(there.slope) <= curvature * abs(slope)

    low, step, high = origin, start, None
    while high is None and count < evaluations:
        there = look(step)
        if too_high(there, low):
            high = there
        elif flat(there):
            return there.step
        elif there.slope >= 0:
            low, high = there, low
        else:
            guess = _cubic(low, there)
            reach = _FARTHER * there.step
            low, step = there, reach if math.isnan(guess) or guess <= there.step else min(max(guess, 1.1 * step), reach)
    while high is not None and count < evaluations:
        span = high.step - low.step
        if abs(span) <= resolution:
            break
        guess = _cubic(low, high)
        if math.isnan(guess):
            guess = low.step + 0.5 * span
        ends = sorted((low.step + _MARGIN * span, high.step - _MARGIN * span))
        step = min(max(guess, ends[0]), ends[1])
        there = look(step)
        if too_high(there, low):
            high = there
        elif flat(there):
            return there.step
        else:
            if there.slope * span >= 0:
                high = low
            low = there
    return low.step or None


def _cubic(a: Point, b: Point) -> float:
    """The minimiser of the cubic through two points with their slopes; NaN if there is none."""
    if not math.isfinite(a.value + b.value + a.slope + b.slope) or a.step == b.step:
        return math.nan
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.step - b.step)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), b.step - a.step)
    divisor = b.slope - a.slope + 2 * d2
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / divisor if divisor else math.nan
