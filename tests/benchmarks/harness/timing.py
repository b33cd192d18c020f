"""Reference and candidate in alternation, in one process, by its CPU time: other programs change neither much."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Quartiles of n ratios of the candidate's time to the reference's."""

    low: float
    median: float
    high: float
    n: int


def clock(f: Callable[[], object], n: int = 1) -> float:
    start = time.process_time()
    for _ in range(n):
        f()
    return (time.process_time() - start) / n


def ratio(
    reference: Callable[[], object], candidate: Callable[[], object], *, block: int = 1, seconds: float = 2.0
) -> Ratio:
    """Ratios of ``block`` calls each between two timings of the reference: 3 to 15 of them, as ``seconds`` allow.

    The clock of a process ticks coarsely, so what is short is repeated until it takes 20 ms.
    """
    reference()
    candidate()
    often = max(1, min(50, int(0.02 / max(clock(reference), 1e-6))))
    repeats = block * max(1, min(50, int(0.02 / max(clock(candidate, block) * block, 1e-6))))
    ratios: list[float] = []
    before, start = clock(reference, often), time.process_time()
    while len(ratios) < 3 or (len(ratios) < 15 and time.process_time() - start < seconds):
        taken = clock(candidate, repeats)
        after = clock(reference, often)
        ratios.append(taken / max(0.5 * (before + after), 1e-9))
        before = after
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(low, median, high, len(ratios))
