"""The command line of the demo."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import pprint
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from precond.demo.contenders import CONTENDERS, TUNED
from precond.demo.plot import plot
from precond.demo.race import Run, train, tune, warm_up
from precond.demo.report import table, verdict
from precond.demo.tasks import TASKS

QUICK_STEPS = 10
# The shown runs start elsewhere than the runs that chose the settings.
TUNING_SEEDS, DEMO_SEED = (0, 1), 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a parser."""
    parser.add_argument(
        "--out", type=Path, default=Path("precond-demo.png"), help="where the figure goes (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_STEPS} steps each: shows that it runs")
    parser.add_argument("--tune", action="store_true", help="search the grids instead and print the table of the best")


def run(options: argparse.Namespace) -> None:
    """Run the demo.

    Args:
        options: Those of :func:`add_arguments`.

    Raises:
        SystemExit: If a package of the ``demo`` extra is missing, or the folder of the figure.
    """
    require_extra()
    steps = QUICK_STEPS if options.quick else None
    with one_thread(), bounds_untold():
        if options.tune:
            search(steps)
        else:
            race(options.out, steps)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: as fast for matrices this small, and sums do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def bounds_untold() -> Iterator[None]:
    """No warnings inside that a bound sets the length of most steps: that is what the contenders' bound is for."""
    log = logging.getLogger("precond.step.bounded")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def require_extra() -> None:
    """Leave with advice if a package of the ``demo`` extra is missing."""
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"The demo needs {' and '.join(missing)}, which this environment lacks. Install the extra with "
            "`pip install '.[demo]'` in a checkout of precond, or let `make demo` do everything."
        )


def race(out: Path, steps: int | None) -> None:
    """Train every task with every optimizer; print the table, save the figure."""
    if not out.absolute().parent.is_dir():
        raise SystemExit(f"--out {out}: the folder {out.absolute().parent} does not exist. Create it first.")
    start = time.perf_counter()
    runs: list[Run] = []
    for task in TASKS:
        for contender in CONTENDERS:
            settings = TUNED[task.name, contender.name]
            warm_up(task, contender, settings)
            runs.append(train(task, contender, settings, seed=DEMO_SEED, steps=steps or task.steps))
    print(table(runs))
    print()
    for task in TASKS:
        print(verdict([run for run in runs if run.task is task]))
    plot(runs, out)
    print(f"\nFigure: {out.resolve()}    ({time.perf_counter() - start:.0f} s in all)")


def search(steps: int | None) -> None:
    """Search all grids and print the best settings as ``contenders.TUNED`` holds them."""
    best = {}
    for task in TASKS:
        for contender in CONTENDERS:
            trials = tune(task, contender, seeds=TUNING_SEEDS, steps=steps or task.steps)
            best[task.name, contender.name] = trials[0].settings
            print(f"{task.name}, {contender.name}: {len(trials)} points, the best three", flush=True)
            for trial in trials[:3]:
                print(f"    {trial.settings} " + ", ".join(run.summary() for run in trial.runs), flush=True)
            if edges := contender.at_edge(trials[0].settings):
                print(f"    at the edge of the grid: {', '.join(edges)}")
    print("\nTUNED = " + pprint.pformat(best, sort_dicts=False, width=120))
