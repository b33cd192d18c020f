"""The figure of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from precond.demo.race import Run
from solvers.files import save_figure

# Colours of Okabe and Ito, told apart with any colour vision; line styles repeat the distinction.
STYLES = {
    "K-FAC": ("#d55e00", "-"),
    "EKFAC": ("#cc79a7", "--"),
    "AdamW": ("#0072b2", "-."),
    "SGD": ("#000000", ":"),
}
UNITS = {"steps": "steps", "seconds": "CPU seconds, one thread"}


def plot(runs: Sequence[Run], path: Path) -> None:
    """Training loss against steps and against seconds, one row per task.

    Args:
        runs: The runs to show.
        path: Where the figure goes; the suffix says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list({run.task.name: run.task for run in runs}.values())
    figure = Figure(figsize=(10, 3.6 * len(tasks)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no window, for every matplotlib backend
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row, task in zip(axes, tasks, strict=True):
        for axis, (unit, label) in zip(row, UNITS.items(), strict=True):
            for run in runs:
                if run.task is task:
                    color, style = STYLES[run.contender]
                    axis.plot(getattr(run, unit), run.losses, style, color=color, lw=1.6, label=run.contender)
            axis.axhline(task.target, color="0.6", lw=0.8, zorder=0)
            axis.set_yscale("log")
            axis.set_xlim(left=0)
            axis.set_xlabel(label)
            axis.grid(True, which="major", color="0.9", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{task.name}: training loss")
        row[1].annotate(
            "target", (1, task.target), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", color="0.3", fontsize=8,
        )  # fmt: skip
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STYLES), frameon=False)
    save_figure(figure, path, dpi=150)
