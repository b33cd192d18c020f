"""Named entries of the benchmarks.

An entry of kind ``optim`` is built as ``build(workload, interval=1)`` and gives a function that makes a training step.
One of kind ``curvature`` is built as ``build(workload)`` and gives a function that computes ``meta["op"]``, or a pair
of it and a function that makes its result a flat tensor, to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    name: str
    kind: str
    build: Callable[..., Any]
    meta: dict[str, Any]


ENTRIES: list[Entry] = []


def register(name: str, kind: str, **meta: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(build: Callable[..., Any]) -> Callable[..., Any]:
        ENTRIES.append(Entry(name, kind, build, meta))
        return build

    return add
