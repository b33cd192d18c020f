"""Pictures of a loss away from the model: surfaces and paths between models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curvature.landscape.interpolation import Interpolation
from curvature.landscape.surface import Surface
from curvature.model.arguments import a, anything, checked, count, one_of, optional
from curvature.plots.layers import bars
from curvature.plots.style import colour, ink, legend, library, numbers, prepare
from solvers.outcome.arguments import flag

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A cliff takes a logarithmic scale where the highest value is this much above the median, both above the lowest.
_STEEP = 10.0


@checked(result=a(Surface, "a result of surface()"), ax=anything, log=optional(flag), contours=count(low=0))
def surface(result: Surface, ax: Axes | None = None, *, log: bool | None = None, contours: int = 8) -> Axes:
    """A plane as coloured cells with contour lines, a line as a curve; the model and given checkpoints are marked.

    Cells where the number is NaN or infinite are crossed out, not filled.

    Args:
        result: From :func:`curvature.surface`.
        ax: Axes to draw into.
        log: Logarithmic colours, or values on a line; ``None`` takes them where a cliff would swallow the rest.
        contours: How many lines; 0 for none.
    """
    if result.betas is None:
        return _line(result, ax, log)
    ax = prepare(ax, size=(5.4, 4.4))
    ax.grid(visible=False)
    x, y, z = numbers(result.alphas), numbers(result.betas), numbers(result.values).T
    good = np.isfinite(z)
    if good.any():
        scale = _scale(z[good], log)
        mesh = ax.pcolormesh(x, y, np.ma.masked_invalid(z), norm=scale, shading="nearest", rasterized=True)
        ax.figure.colorbar(mesh, ax=ax, label=result.metric).outline.set_visible(False)
        if contours and min(z.shape) > 1 and np.ptp(z[good]) > 0:
            levels = scale.inverse(np.linspace(0, 1, contours + 2)[1:-1])
            ax.contour(x, y, np.ma.masked_invalid(z), levels=levels, colors="white", linewidths=0.6, alpha=0.6)
    if not good.all():
        j, i = np.nonzero(~good)
        ax.plot(x[i], y[j], "x", color=ink(0.7), markersize=4, label="not finite")
        legend(ax, loc="upper right", bbox_to_anchor=(1.0, 1.1))
    for name, (alpha, beta) in result.marks.items():
        ax.plot(alpha, beta, "o", color="white", markeredgecolor="black", markersize=5)
        if len(result.marks) > 1:
            ax.annotate(name, (alpha, beta), xytext=(5, 5), textcoords="offset points", color="white", fontsize="small")
    ax.set_xlabel(result.labels[0])
    ax.set_ylabel(result.labels[1])
    return ax


def _line(result: Surface, ax: Axes | None, log: bool | None) -> Axes:
    ax = prepare(ax)
    x, y = numbers(result.alphas), numbers(result.values)
    good = np.isfinite(y)
    ax.plot(x, np.where(good, y, np.nan), color=colour(0), marker=".", linewidth=1.2)
    if good.any() and _logarithmic(y[good], log):
        ax.set_yscale("log")
    for name, (alpha, _) in result.marks.items():
        ax.axvline(alpha, color=ink(0.4), linewidth=0.8, linestyle="--")
        if len(result.marks) > 1:
            ax.annotate(
                name, (alpha, 1), (3, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize="small", color=ink(0.8),
            )  # fmt: skip
    if not good.all():
        ax.plot(x[~good], np.zeros((~good).sum()), "x", color=ink(0.7), markersize=5, label="not finite",
                transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
        legend(ax)
    ax.set_xlabel(result.labels[0])
    ax.set_ylabel(result.metric)
    return ax


@checked(result=a(Surface, "a result of surface()"), ax=anything, log=optional(flag))
def surface_3d(result: Surface, ax: Any = None, *, log: bool | None = None) -> Any:
    """A plane as a surface in three dimensions, with gaps where the number is NaN or infinite.

    Args:
        result: From :func:`curvature.surface`, of a plane.
        ax: Axes to draw into, of projection "3d".
        log: Logarithmic heights; ``None`` takes them where a cliff would flatten the rest.

    Raises:
        ValueError: If the surface is a line.
        TypeError: If the axes have no third dimension.
    """
    if result.betas is None:
        raise ValueError("a line has no surface to look at. Draw it with surface(), or give two directions.")
    plt = library()
    if ax is None:
        ax = plt.figure(figsize=(5.6, 4.6), layout="constrained").add_subplot(projection="3d")
    elif not hasattr(ax, "plot_surface"):
        raise TypeError("ax must have a third dimension: plt.figure().add_subplot(projection='3d').")
    x, y = np.meshgrid(numbers(result.alphas), numbers(result.betas))
    z = numbers(result.values).T
    good = np.isfinite(z)
    label = result.metric
    if good.any() and _logarithmic(z[good], log):
        z = np.log10(np.where(good & (z > 0), z, np.nan))
        label = f"log10 of {label}"
    z = np.where(np.isfinite(z), z, np.nan)
    if good.any():
        ax.plot_surface(
            x, y, z, cmap=plt.rcParams["image.cmap"], vmin=np.nanmin(z), vmax=np.nanmax(z), rstride=1, cstride=1,
            edgecolor=ink(0.25), linewidth=0.2,
        )  # fmt: skip
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_visible(False)
        axis._axinfo["grid"].update(color=ink(0.12), linewidth=0.6)
    missing = int((~good).sum())
    ax.set_xlabel(result.labels[0], fontsize="small")
    ax.set_ylabel(result.labels[1], fontsize="small")
    ax.set_zlabel(label + (f" ({missing} not finite)" if missing else ""), fontsize="small")
    ax.tick_params(labelsize="small")
    ax.locator_params(nbins=5)
    return ax


@checked(result=a(Interpolation, "a result of interpolation()"), ax=anything, log=flag)
def interpolation(result: Interpolation, ax: Axes | None = None, *, log: bool = False) -> Axes:
    """The curve between two models above the chord between its ends; the barrier is marked where it is.

    Args:
        result: From :func:`curvature.interpolation`.
        ax: Axes to draw into.
        log: Logarithmic values.
    """
    ax = prepare(ax)
    t, y = numbers(result.t), numbers(result.values)
    good = np.isfinite(y)
    chord = (1 - t) * y[0] + t * y[-1]
    ax.plot(t, np.where(good, y, np.nan), color=colour(0), marker=".", linewidth=1.2)
    ax.plot(t, chord, color=ink(0.5), linewidth=0.8, linestyle="--")
    if log:
        ax.set_yscale("log")
    if good.all() and result.barrier > 0:
        at = int(np.argmax(y - chord))
        ax.plot([t[at], t[at]], [chord[at], y[at]], color=colour(1), label=f"barrier {result.barrier:.3g}")
        legend(ax)
    elif not good.all():
        ax.plot(t[~good], np.zeros((~good).sum()), "x", color=ink(0.7), markersize=5, label="not finite",
                transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
        legend(ax)
    ax.set_xlabel("from model A (0) to model B (1)")
    ax.set_ylabel(result.metric)
    return ax


@checked(result=a(Interpolation, "a result of interpolation()"), ax=anything, around=one_of(("a", "b")))
def barriers(result: Interpolation, ax: Axes | None = None, *, around: Literal["a", "b"] = "a") -> Axes:
    """The barrier of each layer, moved alone between the other layers of model A (or B).

    Args:
        result: From :func:`curvature.interpolation`, with ``layerwise=True``.
        ax: Axes to draw into.
        around: Whose other layers.
    """
    return bars(_by_layer(result, around), ax, label=f"barrier of {result.metric}, other layers of {around.upper()}")


@checked(result=a(Interpolation, "a result of interpolation()"), ax=anything, around=one_of(("a", "b")))
def layer_paths(result: Interpolation, ax: Axes | None = None, *, around: Literal["a", "b"] = "a") -> Axes:
    """A row for each layer: how far the curve is above the chord along its way, as colour.

    Args:
        result: From :func:`curvature.interpolation`, with ``layerwise=True``.
        ax: Axes to draw into.
        around: Whose other layers.
    """
    from matplotlib.colors import TwoSlopeNorm

    layers = list(_by_layer(result, around))
    ax = prepare(ax, size=(6.0, 1.2 + 0.26 * len(layers)))
    ax.grid(visible=False)
    curves = result.from_a if around == "a" else result.from_b
    t = numbers(result.t)
    y = np.stack([numbers(curves[layer][result.metric]) for layer in layers])
    y = y - ((1 - t) * y[:, :1] + t * y[:, -1:])
    cells = np.ma.masked_invalid(y)
    reach = float(np.abs(cells).max()) if cells.count() else 0.0
    scale = TwoSlopeNorm(0, -reach or -1, reach or 1)
    mesh = ax.pcolormesh(t, np.arange(len(layers)), cells, norm=scale, cmap="coolwarm", shading="nearest")
    ax.figure.colorbar(mesh, ax=ax, label=f"{result.metric} above the chord").outline.set_visible(False)
    row, column = np.nonzero(np.ma.getmaskarray(cells))
    if len(row):
        ax.plot(t[column], row, "x", color=ink(0.7), markersize=4, label="not finite")
        legend(ax, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    ax.set_yticks(range(len(layers)), layers)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.set_xlabel("this layer from model A (0) to model B (1)")
    return ax


def _by_layer(result: Interpolation, around: Literal["a", "b"]) -> dict[str, float]:
    found = result.barriers(around)
    if not found:
        raise ValueError("there are no layers to draw: interpolate with layerwise=True.")
    return found


def _logarithmic(values: np.ndarray, log: bool | None) -> bool:
    if log is None:
        low, middle, high = values.min(), np.median(values), values.max()
        return bool(low > 0 and high - low > _STEEP * (middle - low) and high > _STEEP * low)
    if log and not (values > 0).all():
        raise ValueError(f"log=True needs positive numbers, the lowest is {values.min():.3g}. Leave log out.")
    return log


def _scale(values: np.ndarray, log: bool | None) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    kind = LogNorm if _logarithmic(values, log) else Normalize
    return kind(values.min(), values.max())
