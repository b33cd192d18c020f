"""Numbers for readers: only the digits that are known."""

from __future__ import annotations

from math import floor, log10

from curvature.reports.results import Condition, Eigenvalue, Number

DIGITS = 4
DASH = "\N{EN DASH}"


def plain(value: float, digits: int = DIGITS) -> str:
    """A number to some significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def number(x: Number | None) -> str:
    """A number with its standard error, to as many digits as that allows."""
    if x is None:
        return DASH
    return plain(x.value) if x.exact else with_error(x.value, x.error)


def with_error(value: float, error: float) -> str:
    """``value ± error`` with two digits of the error, which is left out where it does not reach the digits shown."""
    if value != 0 and error < 0.5 * 10.0 ** (floor(log10(abs(value))) - DIGITS + 1):
        return plain(value)
    size = max(abs(value), error)
    exponent = floor(log10(size)) if size >= 1e6 or size < 1e-3 else 0
    decimals = max(0, exponent + 1 - floor(log10(error)))
    text = f"{value / 10**exponent:,.{decimals}f} ± {error / 10**exponent:,.{decimals}f}"
    return f"({text})e{exponent:+03d}" if exponent else text


def eigenvalue(x: Eigenvalue | None) -> str:
    """An eigenvalue with its bound; marked where it has not converged."""
    if x is None:
        return DASH
    return with_error(x.value, x.residual) + ("" if x.converged else " *")


def share(value: float, error: float = 0.0) -> str:
    """A share in percent; its error is left out where it does not reach the digits shown."""
    shown = f"{100 * value:.1f}"
    shown = "0.0" if shown == "-0.0" else shown
    return f"{shown} ± {100 * error:.1f} %" if error >= 5e-4 else f"{shown} %"


def condition(x: Condition | None) -> str:
    """A condition number between its bounds."""
    if x is None:
        return DASH
    low, high = plain(x.low, 3), plain(x.high, 3)
    return low if low == high else f"{low} to {high}"


def memory(size: int) -> str:
    """Bytes in units that people read."""
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def seconds(value: float) -> str:
    """A duration."""
    if value < 100:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
