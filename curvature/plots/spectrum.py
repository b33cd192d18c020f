"""Pictures of spectra: densities with their bands, eigenvalues with their residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curvature.model.arguments import a, anything, checked, optional, real
from curvature.plots.style import ERRORS, colour, ink, legend, numbers, prepare
from solvers import Density, Eigenpairs
from solvers.outcome.arguments import flag

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked(
    result=a(Density, "a Density"),
    ax=anything,
    log=flag,
    label=a(str, "a string"),
    floor=optional(real(low=0.0, open_low=True)),
)
def density(
    result: Density,
    ax: Axes | None = None,
    *,
    log: bool = True,
    label: str = "eigenvalue",
    floor: float | None = None,
) -> Axes:
    """Spectral density with a band of two standard errors.

    Args:
        result: From :func:`solvers.spectral_density`.
        ax: Axes to draw into.
        log: Logarithmic density. The few outliers of a model with many parameters have little weight, and are seen
            on this scale only.
        label: Of the horizontal axis.
        floor: Where the logarithmic scale begins; a decade below the lowest peak by default.

    Raises:
        ValueError: If a floor is given for a scale that is not logarithmic.
    """
    if floor is not None and not log:
        raise ValueError(f"floor={floor:g} is where a logarithmic scale begins; log=False begins at 0.")
    ax = prepare(ax)
    x, y, error = numbers(result.grid), numbers(result.density), ERRORS * numbers(result.stderr)
    low, high = y - error, y + error
    if log:
        floor = lowest_shown(result) if floor is None else floor
        y, low, high = (np.maximum(values, floor) for values in (y, low, high))
        ax.set_yscale("log")
        ax.set_ylim(floor, 2 * max(float(high.max()), 10 * floor))
    else:
        low = np.maximum(low, 0)
        ax.set_ylim(0, 1.05 * float(high.max()))
    if (error > 0).any() and np.isfinite(error).all():
        ax.fill_between(x, low, high, color=colour(0), alpha=0.25, linewidth=0, label=f"± {ERRORS:g} standard errors")
        legend(ax)
    ax.plot(x, y, color=colour(0), linewidth=1.2)
    ax.axvline(0, color=ink(0.4), linewidth=0.6)
    ax.set_xlim(x[0], x[-1])
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


@checked(result=a(Eigenpairs, "Eigenpairs"), ax=anything, log=flag, label=a(str, "a string"))
def eigenvalues(result: Eigenpairs, ax: Axes | None = None, *, log: bool = False, label: str = "eigenvalue") -> Axes:
    """Eigenvalues by rank, each with a bar as long as its residual: there is an eigenvalue within the bar.

    Pairs that have not converged are hollow.

    Args:
        result: From :func:`solvers.eigsh`.
        ax: Axes to draw into.
        log: Logarithmic scale; where there are eigenvalues that are not positive, it is linear near zero.
        label: Of the vertical axis.
    """
    ax = prepare(ax, grid="y")
    values, residuals = numbers(result.values), numbers(result.residuals)
    done = numbers(result.converged).astype(bool)
    rank = np.arange(1, len(values) + 1)
    for chosen, fill, text in ((done, colour(0), "converged"), (~done, "none", "not converged")):
        if chosen.any():
            ax.errorbar(
                rank[chosen],
                values[chosen],
                residuals[chosen],
                fmt="o",
                markersize=4.5,
                markerfacecolor=fill,
                color=colour(0),
                elinewidth=1,
                label=text,
            )
    if not done.all():
        legend(ax)
    if log and (values > 0).all():
        ax.set_yscale("log")
    elif log:
        ax.set_yscale("symlog", linthresh=float(np.abs(values[values != 0]).min()) if values.any() else 1.0)
    if not log or (values <= 0).any():
        ax.axhline(0, color=ink(0.4), linewidth=0.6)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("rank")
    ax.set_ylabel(label)
    return ax
