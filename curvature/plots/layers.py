"""Pictures of numbers by layer, and of numbers by example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from curvature.model.arguments import a, anything, checked, count, optional
from curvature.plots.style import ERRORS, colour, ink, legend, numbers, prepare, value_and_error
from solvers import Estimate
from solvers.outcome.arguments import flag

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*X"

Number = Estimate | Tensor | float


@checked(values=a(Mapping, "a mapping of names to numbers"), ax=anything, label=a(str, "a string"), most=count())
def bars(values: Mapping[str, Number], ax: Axes | None = None, *, label: str = "", most: int = 30) -> Axes:
    """One horizontal bar for each name, with two standard errors to both sides.

    Args:
        values: ``{name: Estimate or number}``, drawn from top to bottom.
        ax: Axes to draw into.
        label: Name of the numbers, with their unit.
        most: Bars at most: where there are more, the largest in magnitude are drawn and the rest are counted.

    Raises:
        ValueError: If the data are empty.
    """
    pairs = {name: value_and_error(entry) for name, entry in values.items()}
    return _bars(pairs, ax, label, most)


@checked(values=a(Mapping, "a mapping of names to numbers"), ax=anything, label=a(str, "a string"), most=count())
def shares(values: Mapping[str, Number], ax: Axes | None = None, *, label: str = "share", most: int = 30) -> Axes:
    """The share of each layer in a total, such as a trace, in per cent with two standard errors.

    The total is taken as exact: errors are those of the parts.

    Args:
        values: ``{layer: Estimate or number}``; a layer may be negative, their sum may not.
        ax: Axes to draw into.
        label: Of what the shares are.
        most: Bars at most: the largest are drawn, the rest counted.

    Raises:
        ValueError: If the sum is not positive.
    """
    pairs = {name: value_and_error(entry) for name, entry in values.items()}
    total = sum(value for value, _ in pairs.values())
    if not total > 0:
        raise ValueError(f"shares of a total of {total:.3g} mean nothing. Use bars() for the numbers themselves.")
    percent = {name: (100 * value / total, 100 * error / total) for name, (value, error) in pairs.items()}
    return _bars(percent, ax, f"{label} (%)", most)


def _bars(pairs: Mapping[str, tuple[float, float]], ax: Axes | None, label: str, most: int) -> Axes:
    if not pairs:
        raise ValueError("there is nothing to draw: the mapping is empty.")
    names = list(pairs)
    if len(names) > most:
        largest = set(sorted(names, key=lambda name: -abs(pairs[name][0]))[:most])
        names = [name for name in names if name in largest]
    height = np.array([pairs[name][0] for name in names])
    error = np.array([pairs[name][1] for name in names])
    ax = prepare(ax, grid="x", size=(6.0, 0.8 + 0.24 * len(names)))
    rows = np.arange(len(names))
    ax.barh(rows, height, height=0.62, color=colour(0), alpha=0.75)
    if (error > 0).any():
        ax.errorbar(height, rows, xerr=ERRORS * error, fmt="none", ecolor=ink(0.9), elinewidth=1)
    if (height < 0).any():
        ax.axvline(0, color=ink(0.4), linewidth=0.6)
    else:
        ax.set_xlim(0, None if height.any() else 1)
    left_out = len(pairs) - len(names)
    _rows(ax, names)
    ax.set_xlabel(label + (f"  ({left_out} smaller ones not shown)" if left_out else ""))
    return ax


@checked(values=a(Mapping, "a mapping of names to numbers"), ax=anything, label=a(str, "a string"), most=count())
def distances(
    values: Mapping[str, Mapping[str, Number]],
    ax: Axes | None = None,
    *,
    label: str = "relative distance (Frobenius)",
    most: int = 30,
) -> Axes:
    """How far each structure is from the matrix it stands for, layer by layer, with two standard errors.

    Args:
        values: ``{layer: {structure: Estimate or number}}``; a layer need not have every structure.
        ax: Axes to draw into.
        label: Name of the numbers.
        most: Layers at most: those with the largest distances are drawn, the rest counted.

    Raises:
        ValueError: If the data are empty.
    """
    pairs = {
        layer: {name: value_and_error(entry) for name, entry in entries.items()} for layer, entries in values.items()
    }
    pairs = {layer: entries for layer, entries in pairs.items() if entries}
    if not pairs:
        raise ValueError("there is nothing to draw: no layer has a distance.")
    layers = list(pairs)
    if len(layers) > most:
        largest = set(sorted(layers, key=lambda layer: -max(value for value, _ in pairs[layer].values()))[:most])
        layers = [layer for layer in layers if layer in largest]
    structures = list(dict.fromkeys(name for layer in layers for name in pairs[layer]))
    ax = prepare(ax, grid="x", size=(6.0, 1.2 + 0.3 * len(layers)))
    for i, name in enumerate(structures):
        rows = [row for row, layer in enumerate(layers) if name in pairs[layer]]
        found = [pairs[layers[row]][name] for row in rows]
        # side by side, so that equal numbers do not hide each other
        offset = 0.5 * (i - (len(structures) - 1) / 2) / max(1, len(structures))
        ax.errorbar(
            [value for value, _ in found],
            [row + offset for row in rows],
            xerr=[ERRORS * error for _, error in found],
            fmt=_MARKERS[i % len(_MARKERS)],
            markersize=4.5,
            color=colour(i),
            elinewidth=1,
            label=name,
        )
    _rows(ax, layers)
    ax.set_xlim(left=0)
    left_out = len(pairs) - len(layers)
    ax.set_xlabel(label + (f"  ({left_out} nearer layers not shown)" if left_out else ""))
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(structures)))
    return ax


def _rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(len(names) - 0.4, -0.6)


@checked(
    squares=a((Mapping, Tensor), "squared norms, or a mapping of them"),
    ax=anything,
    log=optional(flag),
    label=a(str, "a string"),
)
def gradient_norms(
    squares: Mapping[str, Tensor] | Tensor,
    ax: Axes | None = None,
    *,
    log: bool | None = None,
    label: str = "gradient norm",
) -> Axes:
    """Histogram of the norms of the examples' gradients, with the median marked.

    Args:
        squares: Squared norms, ``{parameter: (N,)}`` from :func:`curvature.per_sample_norms`, or their sum ``(N,)``.
        ax: Axes to draw into.
        log: Logarithmic norms, on which the few examples that dominate are told apart from the many that are fitted;
            gradients that are exactly zero are then counted in the label. None takes it beyond a factor of 30.
        label: Of the horizontal axis.

    Raises:
        ValueError: If examples are missing, or a square is negative or not finite.
    """
    parts = [numbers(v) for v in squares.values()] if isinstance(squares, Mapping) else [numbers(squares)]
    total = np.sum(parts, axis=0) if parts else np.zeros(0)
    if not total.size or not np.isfinite(total).all() or (total < 0).any():
        raise ValueError(
            "gradient_norms needs the squared norm of at least one example, all finite and none negative: pass what "
            "curvature.per_sample_norms returns."
        )
    norms = np.sqrt(total)
    positive = norms[norms > 0]
    if log is None:
        log = bool(len(positive)) and positive.max() > 30 * positive.min()
    shown = positive if log else norms
    ax = prepare(ax, grid="y")
    zeros = len(norms) - len(shown)
    if len(shown):
        spread = shown.max() > shown.min()
        count = int(np.clip(np.sqrt(len(norms)) * 2, 5, 60))
        if log and spread:
            bins = np.geomspace(shown.min(), shown.max(), count + 1)
            ax.set_xscale("log")
        else:
            bins = np.linspace(shown.min(), shown.max(), count + 1) if spread else np.array([0.5, 1.5]) * shown[0]
        ax.hist(np.clip(shown, bins[0], bins[-1]), bins=bins.tolist(), color=colour(0), alpha=0.75)
        median = float(np.median(shown))
        ax.axvline(median, color=ink(0.8), linewidth=1, linestyle="--", label=f"median {median:.3g}")
        legend(ax)
    ax.set_xlabel(label + (f"  ({zeros} of {len(norms)} are zero)" if zeros else ""))
    ax.set_ylabel("examples")
    return ax
