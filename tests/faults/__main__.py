"""Print the table of faults: ``python -m tests.faults [METHOD ...]``."""

from __future__ import annotations

import sys
from collections import Counter

import torch

from tests.faults.injection import METHODS, injections


def main(names: list[str]) -> None:
    """Put all faults into all methods, and count what becomes of them, by method and by fault."""
    torch.set_num_threads(1)
    by_method: dict[str, Counter[str]] = {}
    by_fault: dict[str, Counter[str]] = {}
    for name in names or sorted(METHODS):
        for kind, outcome in injections(name, long=True):
            by_method.setdefault(name, Counter())[outcome] += 1
            by_fault.setdefault(kind, Counter())[outcome] += 1
    for title, found in (("method", by_method), ("fault", by_fault)):
        print(f"\n| {title} | put in | survived | refused in words | silent | unclear |")
        print("| --- | --- | --- | --- | --- | --- |")
        found["all"] = sum(found.values(), Counter())
        for name, counts in found.items():
            print(f"| {name} | {counts.total()} |", end="")
            print("".join(f" {counts[key]} |" for key in ("survived", "refused", "silent", "unclear")))


main(sys.argv[1:])
