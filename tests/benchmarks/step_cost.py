"""What does a step cost beside one of AdamW, on small models? ``python -m tests.benchmarks.step_cost --methods KFAC``.

All methods train in one process, ten steps of each in turn, so that other work on the machine slows all alike; counted
is the CPU time of a whole run, the batch and its loss included, over that of AdamW. With ``--of least`` it is the least
time of a turn after the first twenty steps in place of the sum, and with ``--of median`` their median: what a step
costs in the long run, in which ten steps hold the refreshes of a period of ten once. Methods are calls as in
:mod:`tests.benchmarks.defaults`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable
from statistics import geometric_mean, median

import torch

from tests.benchmarks.defaults import ALL, PARTS, build

ADAMW = "AdamW(lr=0.006)"
OF: dict[str, Callable[[tuple[float, ...]], float]] = {
    "run": sum,
    "least": lambda turns: min(turns[2:]),
    "median": lambda turns: median(turns[2:]),
}


def trainer(method: str, name: str) -> Callable[[int], float]:
    """A function that takes some steps and returns the seconds of CPU that they took."""
    torch.manual_seed(0)
    problem = ALL[name](0)
    optimizer, generator = build(method, problem), torch.Generator().manual_seed(0)

    def go(steps: int) -> float:
        begin = time.process_time()
        for _ in range(steps):
            x, y = problem.batch(generator)
            optimizer.zero_grad()
            problem.loss(x, y).backward()
            optimizer.step()
        return time.process_time() - begin

    return go


def costs(methods: Iterable[str], name: str, steps: int = 200, of: str = "run") -> list[float]:
    """Of a step of each method, in steps of AdamW."""
    trainer(ADAMW, name)(20)  # what the first steps of all in a process cost is nobody's
    trainers = [trainer(method, name) for method in (ADAMW, *methods)]
    turns = [[go(10) for go in trainers] for _ in range(steps // 10)]
    adamw, *others = map(OF[of], zip(*turns, strict=True))
    return [other / adamw for other in others]


def main() -> None:
    """Print a table: a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=("KFAC", "EKFAC", "TNT", "SOAP"))
    parser.add_argument("--problems", nargs="*", choices=tuple(ALL))
    parser.add_argument("--half", choices=("tune", "confirm", "later"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--of", choices=tuple(OF), default="run")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problems = given.problems or list(PARTS[given.half])
    found = {name: costs(given.methods, name, given.steps, given.of) for name in problems}
    print(f"| steps of AdamW | geometric mean | {' | '.join(problems)} |")
    print(f"| --- | --- |{' --- |' * len(problems)}")
    for i, method in enumerate(given.methods):
        each = [found[name][i] for name in problems]
        print(f"| `{method}` | {geometric_mean(each):.2f} | {' | '.join(f'{cost:.1f}' for cost in each)} |")


if __name__ == "__main__":
    main()
