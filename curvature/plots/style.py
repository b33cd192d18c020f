"""The look that all pictures share: few lines, colours of the reader's own style, numbers with their errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from solvers import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How far standard errors reach to both sides in a picture: about 95 % of repetitions.
ERRORS = 2.0


def library() -> Any:
    """``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed. Install it with: pip install 'precond[plot]'",
            name=error.name,
        ) from error
    return plt


def prepare(ax: Axes | None, *, grid: str = "both", size: tuple[float, float] = (6.0, 3.6)) -> Axes:
    """Axes to draw into, made quiet: no frame, a faint grid.

    Args:
        ax: Axes of the caller's; ``None`` makes a figure.
        grid: Along which axes lines help to read values: ``"x"``, ``"y"`` or ``"both"``.
        size: Of a new figure, in inches.

    Raises:
        TypeError: If ``ax`` is not an axes.
    """
    plt = library()
    if ax is None:
        ax = plt.figure(figsize=size, layout="constrained").subplots()
    elif not hasattr(ax, "plot"):
        raise TypeError(
            f"ax must be matplotlib axes, got {type(ax).__name__}. plt.subplots() returns a figure and axes."
        )
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(ink(0.4))
    ax.tick_params(color=ink(0.4), length=3)
    ax.set_axisbelow(True)
    ax.grid(visible=False)
    ax.grid(visible=True, axis=grid, color=ink(0.12), linewidth=0.6, linestyle="-")  # type: ignore[arg-type]
    return ax


def ink(alpha: float) -> tuple[float, float, float, float]:
    """The colour of text, thinned; right on light and on dark."""
    plt = library()
    from matplotlib import colors

    return colors.to_rgba(plt.rcParams["text.color"], alpha)


def colour(index: int) -> str:
    """A colour of the reader's cycle, as ``#rrggbb``."""
    plt = library()
    from matplotlib import colors

    cycle = plt.rcParams["axes.prop_cycle"].by_key().get("color", ["tab:blue"])
    return colors.to_hex(cycle[index % len(cycle)])


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame."""
    ax.legend(frameon=False, **{"fontsize": "small", **options})


def numbers(values: Any) -> np.ndarray:
    """A tensor or sequence as float64 on the host."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def value_and_error(entry: Estimate | Tensor | float) -> tuple[float, float]:
    """A number and its standard error, 0 where it has none.

    Raises:
        TypeError: If it is not one number.
    """
    value, error = (entry.value, entry.stderr) if isinstance(entry, Estimate) else (entry, 0.0)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"expected one number, or an Estimate of one, got a tensor of shape {tuple(value.shape)}.")
    return float(value), float(error)
