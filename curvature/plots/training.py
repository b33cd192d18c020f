"""Pictures of measurements along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvature.model.arguments import anything, checked, several
from curvature.plots.style import colour, ink, legend, prepare
from curvature.training.dynamics import Dynamics
from curvature.training.subspace import Subspace, SubspaceRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _check_subspace(name: str, value: Any) -> Any:
    return value if isinstance(value, Subspace) else several(SubspaceRecord, "records of a Subspace")(name, value)


@checked(result=_check_subspace, ax=anything)
def subspace(result: Subspace | Sequence[SubspaceRecord], ax: Axes | None = None) -> Axes:
    """How much of the gradient lies in the leading eigenspace, and how far this has turned.

    Measurements whose eigenvectors are not determined (an error above 1/2) are hollow.

    Args:
        result: A :class:`curvature.Subspace`, or measurements of one.
        ax: Axes to draw into.

    Raises:
        ValueError: If measurements are missing.
    """
    records = result.history if isinstance(result, Subspace) else list(result)
    if not records:
        raise ValueError("there is nothing to draw: no measurement yet. Call update().")
    ax = prepare(ax)
    curves = {
        "gradient inside": [record.share for record in records],
        "overlap with the one before": [np.nan if r.previous is None else r.previous.value for r in records],
        "overlap with the first": [record.first.value for record in records],
    }
    steps = np.array([record.step for record in records])
    vague = np.array([record.error > 0.5 for record in records])
    background = ax.get_facecolor()
    for i, (name, values) in enumerate(curves.items()):
        ax.plot(steps, values, color=colour(i), marker="o", markersize=4, linewidth=1.2, label=name)
        hollow = np.where(vague, np.array(values), np.nan)
        ax.plot(steps, hollow, "o", markersize=4, color=colour(i), markerfacecolor=background)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("step")
    ax.set_ylabel(f"share, in {len(records[0].values)} dimensions")
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax


@checked(result=several(Dynamics, "results of dynamics()"), ax=anything)
def dynamics(result: Mapping[int, Dynamics] | Sequence[Dynamics], ax: Axes | None = None) -> Axes:
    """How near the edge of stability steps were along training, with residuals; the edge is marked.

    Args:
        result: ``{step: Dynamics}``, or a sequence of them.
        ax: Axes to draw into.

    Raises:
        ValueError: If measurements are missing.
    """
    items = list(result.items()) if isinstance(result, Mapping) else list(enumerate(result))
    if not items:
        raise ValueError("there is nothing to draw: no measurement.")
    ax = prepare(ax)
    ax.errorbar(
        [step for step, _ in items],
        [found.ratio for _, found in items],
        [found.ratio_error for _, found in items],
        color=colour(0),
        marker="o",
        markersize=4,
        linewidth=1.2,
        elinewidth=1,
    )
    ax.axhline(1, color=ink(0.6), linewidth=0.8, linestyle="--")
    ax.annotate("edge of stability", (1, 1), xytext=(-2, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize="small", color=ink(0.8))  # fmt: skip
    high = max(found.ratio + found.ratio_error for _, found in items)
    low = min(found.ratio - found.ratio_error for _, found in items)
    ax.set_ylim(min(0.0, 1.1 * low), 1.1 * max(1.0, high))
    ax.set_xlabel("step")
    ax.set_ylabel("sharpness / threshold")
    return ax
