"""The text that the demo prints."""

from __future__ import annotations

from collections.abc import Sequence

from precond.demo.race import Run

SECOND_ORDER = ("K-FAC", "EKFAC")
NOISE = 0.1  # smaller relative gaps are noise: seconds differ by as much from run to run


def table(runs: Sequence[Run]) -> str:
    """One row per run: steps and seconds to the target, cost of a step, loss and held-out score at the end."""
    header = ("task", "optimizer", "settings", "steps", "seconds", "ms/step", "final loss", "held out")
    rows = [
        (
            run.task.name,
            run.contender,
            ", ".join(f"{name} {value:g}" for name, value in run.settings.items()),
            *_to_target(run),
            f"{1e3 * run.seconds[-1] / run.steps[-1]:.1f}",
            f"{run.losses[-1]:.2g}",
            f"{run.task.measure} {run.held_out:.3f}",
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    targets = ", ".join(dict.fromkeys(f"{run.task.name} {run.task.target:g}" for run in runs))
    return "\n".join([f"Steps and CPU seconds until the loss on all training data is at most: {targets}.", "", *lines])


def _to_target(run: Run) -> tuple[str, str]:
    if run.reached is None:
        return "diverged" if run.diverged else f"> {run.steps[-1]}", f"> {run.seconds[-1]:.2g}"
    return str(run.steps[run.reached]), f"{run.seconds[run.reached]:.2g}"


def verdict(runs: Sequence[Run]) -> str:
    """One sentence for each second-order method of a task: against the best of the others, in steps and in seconds."""
    return "\n".join(_compare(run, runs) for run in runs if run.contender in SECOND_ORDER)


def _compare(run: Run, runs: Sequence[Run]) -> str:
    who = f"{run.task.name}: {run.contender}"
    rivals = [other for other in runs if other.contender not in SECOND_ORDER and other.reached is not None]
    if run.reached is None:
        return f"{who} does not reach the target."
    if not rivals:
        return f"{who} reaches the target; no first-order method does."
    return f"{who} {_ratio(run, rivals, 'steps')} and {_ratio(run, rivals, 'seconds')}."


def _ratio(run: Run, rivals: Sequence[Run], unit: str) -> str:
    """Such as "wins in steps (150 against 590 of AdamW)"."""

    def cost(one: Run) -> float:
        assert one.reached is not None
        return float(getattr(one, unit)[one.reached])

    best = min(rivals, key=cost)
    if abs(cost(run) - cost(best)) < NOISE * cost(best):
        outcome = "is level"
    else:
        outcome = "wins" if cost(run) < cost(best) else "does not win"
    return f"{outcome} in {unit} ({cost(run):.3g} against {cost(best):.3g} of {best.contender})"
