"""Pictures of spectra: densities with their bands, eigenvalues with their residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from curvature.model.arguments import a, anything, checked, optional, real
from curvature.plots.style import ERRORS, colour, ink, legend, numbers, prepare
from solvers import Density, Eigenpairs
from solvers.outcome.arguments import flag

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked(
    result=a((Density, Mapping), "a Density, or a mapping of names to them"),
    ax=anything,
    log=flag,
    label=a(str, "a string"),
    floor=optional(real(low=0.0, open_low=True)),
)
def density(
    result: Density | Mapping[str, Density],
    ax: Axes | None = None,
    *,
    log: bool = True,
    label: str = "eigenvalue",
    floor: float | None = None,
) -> Axes:
    """Spectral density with a band of two standard errors; several over each other, by name.

    Args:
        result: From :func:`solvers.spectral_density`, or ``{name: density}``.
        ax: Axes to draw into.
        log: Logarithmic density. The few outliers of a model with many parameters have little weight, and are seen
            on this scale only.
        label: Of the horizontal axis.
        floor: Where the logarithmic scale begins; a decade below the lowest peak by default.

    Raises:
        ValueError: If a floor is given for a scale that is not logarithmic, or there is no density.
    """
    if floor is not None and not log:
        raise ValueError(f"floor={floor:g} is where a logarithmic scale begins; log=False begins at 0.")
    named = result if isinstance(result, Mapping) else {"": result}
    if not named:
        raise ValueError("there is nothing to draw: the mapping is empty.")
    ax = prepare(ax)
    floor = min(map(lowest_shown, named.values())) if floor is None else floor
    tops, banded = [], False
    for index, (name, found) in enumerate(named.items()):
        x, y, error = numbers(found.grid), numbers(found.density), ERRORS * numbers(found.stderr)
        low, high = y - error, y + error
        tops.append(float(high.max() if np.isfinite(high).all() else y.max()))  # one probe has no error
        if log:
            y, low, high = (np.maximum(values, floor) for values in (y, low, high))
        else:
            low = np.maximum(low, 0)
        if (error > 0).any() and np.isfinite(error).all():
            band = None if banded else f"± {ERRORS:g} standard errors"
            ax.fill_between(x, low, high, color=colour(index), alpha=0.25, linewidth=0, label=band)
            banded = True
        ax.plot(x, y, color=colour(index), linewidth=1.2, label=name or None)
    if log:
        ax.set_yscale("log")
        ax.set_ylim(floor, 2 * max(*tops, 10 * floor))
    else:
        ax.set_ylim(0, 1.05 * max(tops))
    if banded or len(named) > 1:
        legend(ax)
    ax.axvline(0, color=ink(0.4), linewidth=0.6)
    ends = [numbers(found.grid)[[0, -1]] for found in named.values()]
    ax.set_xlim(min(left for left, _ in ends), max(right for _, right in ends))
    ax.set_xlabel(label)
    ax.set_ylabel("density")
    return ax


def lowest_shown(result: Density) -> float:
    """Where the logarithmic scale of a density begins.

    A tenth of the lowest peak, above what rounding leaves of a random vector's weights.
    """
    y = numbers(result.density)
    padded = np.concatenate([[0.0], y, [0.0]])
    peaks = y[(y > padded[:-2]) & (y >= padded[2:])]
    peaks = peaks[peaks > 1e-10 * y.max()] if len(peaks) else y[y > 0]
    return float(peaks.min()) / 10 if len(peaks) else 1e-10


@checked(
    result=a((Eigenpairs, Mapping), "Eigenpairs, or a mapping of names to them"),
    ax=anything,
    log=flag,
    label=a(str, "a string"),
)
def eigenvalues(
    result: Eigenpairs | Mapping[str, Eigenpairs],
    ax: Axes | None = None,
    *,
    log: bool = False,
    label: str = "eigenvalue",
) -> Axes:
    """Eigenvalues by rank, each with a bar as long as its residual: there is an eigenvalue within the bar.

    Pairs that have not converged are hollow.

    Args:
        result: From :func:`solvers.eigsh`, or ``{name: pairs}``, drawn side by side.
        ax: Axes to draw into.
        log: Logarithmic scale; where there are eigenvalues that are not positive, it is linear near zero.
        label: Of the vertical axis.

    Raises:
        ValueError: If there are no eigenvalues.
    """
    named = result if isinstance(result, Mapping) else {"": result}
    if not named:
        raise ValueError("there is nothing to draw: the mapping is empty.")
    ax = prepare(ax, grid="y")
    everything = np.concatenate([numbers(pairs.values) for pairs in named.values()])
    hollow = False
    for index, (name, pairs) in enumerate(named.items()):
        values, residuals = numbers(pairs.values), numbers(pairs.residuals)
        done = numbers(pairs.converged).astype(bool)
        rank = np.arange(1, len(values) + 1) + 0.3 * (index - (len(named) - 1) / 2) / len(named)
        for chosen, fill, text in ((done, colour(index), "converged"), (~done, "none", "not converged")):
            if chosen.any():
                words = ", ".join(word for word in (name, "" if name and done.all() else text) if word)
                ax.errorbar(
                    rank[chosen],
                    values[chosen],
                    residuals[chosen],
                    fmt="o",
                    markersize=4.5,
                    markerfacecolor=fill,
                    color=colour(index),
                    elinewidth=1,
                    label=words,
                )
        hollow = hollow or not done.all()
    if hollow or len(named) > 1:
        legend(ax)
    if log and (everything > 0).all():
        ax.set_yscale("log")
    elif log:
        nonzero = np.abs(everything[everything != 0])
        ax.set_yscale("symlog", linthresh=float(nonzero.min()) if len(nonzero) else 1.0)
    if not log or (everything <= 0).any():
        ax.axhline(0, color=ink(0.4), linewidth=0.6)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("rank")
    ax.set_ylabel(label)
    return ax
