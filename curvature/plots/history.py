"""Pictures of curvature along a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from curvature.model.arguments import a, anything, checked
from curvature.plots.style import ERRORS, colour, ink, legend, numbers, prepare
from curvature.training.monitor import Monitor
from solvers.outcome.arguments import flag

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "sharpness": "largest eigenvalue",
    "trace": "trace",
    "alignment": "share of the squared gradient",
    "stability": "share of the edge of stability",
    "loss": "loss",
    "gradient_norm": "norm of the gradient",
}


@checked(
    result=a((Monitor, Mapping), "a Monitor or its history"),
    ax=anything,
    quantity=a(str, "a name of a column"),
    log=flag,
)
def monitor(
    result: Monitor | Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    quantity: str = "sharpness",
    log: bool = False,
) -> Axes:
    """A quantity over the training steps, with its error.

    The sharpness comes with the other eigenvalues that were measured, each with its residual, and, where the learning
    rate is known, with the edge of stability ``2 / lr`` of plain gradient descent. Unconverged values are
    hollow. The trace comes with two standard errors.

    Args:
        result: A monitor, or its ``history`` (read from its CSV file, say).
        ax: Axes to draw into.
        quantity: A column of the history.
        log: Logarithmic vertical axis.

    Raises:
        KeyError: If the column is missing.
    """
    history = result.history if isinstance(result, Monitor) else result
    if quantity not in history:
        raise KeyError(f"the history has no {quantity!r}; it has {', '.join(history) or 'no rows yet'}.")
    ax = prepare(ax)
    steps = numbers(history["step"])
    names = [quantity]
    if quantity == "sharpness":
        names += sorted((name for name in history if name.removeprefix("eigenvalue_").isdigit()), key=_rank)
    good = numbers(history["converged"]) == 1 if quantity == "sharpness" else np.isfinite(numbers(history[quantity]))
    for i, name in enumerate(names):
        values = numbers(history[name])
        ax.plot(steps, values, color=colour(i), linewidth=1.2, label=_label(name))
        for chosen, fill in ((good, colour(i)), (~good & np.isfinite(values), "none")):
            ax.plot(steps[chosen], values[chosen], "o", markersize=3.5, color=colour(i), markerfacecolor=fill)
        error = _error(history, name)
        if error is not None:
            ax.fill_between(steps, values - error, values + error, color=colour(i), alpha=0.25, linewidth=0)
    if quantity == "sharpness" and "lr" in history:
        edge = 2 / numbers(history["lr"])
        ax.plot(steps, edge, color=ink(0.5), linewidth=1, linestyle="--", label="2 / learning rate")
    if quantity == "stability":
        ax.axhline(1, color=ink(0.5), linewidth=1, linestyle="--")
    if log:
        ax.set_yscale("log")
    if len(ax.get_legend_handles_labels()[0]) > 1:
        legend(ax)
    ax.set_xlabel("training step")
    ax.set_ylabel("eigenvalue" if len(names) > 1 else _LABELS.get(quantity, quantity))
    return ax


def _rank(name: str) -> int:
    return int(name.removeprefix("eigenvalue_"))


def _label(name: str) -> str:
    return "eigenvalue 1" if name == "sharpness" else name.replace("_", " ")


def _error(history: Mapping[str, Sequence[float]], name: str) -> np.ndarray | None:
    """Half the width of the band around a quantity: its residual, or two standard errors."""
    if f"{name}_residual" in history:
        return numbers(history[f"{name}_residual"])
    return ERRORS * numbers(history[f"{name}_stderr"]) if f"{name}_stderr" in history else None
