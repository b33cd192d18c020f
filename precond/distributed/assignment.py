"""Which processes keep which blocks: a function of names and shapes, on which all agree without a word."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod


def cost(shapes: Mapping[str, tuple[tuple[int, ...], bool]]) -> int:
    """Operations of a refresh, up to a constant: ``d^3`` for each symmetric matrix, and the number of all entries.

    Args:
        shapes: Sum -> its shape, and whether it is a stack of symmetric matrices.
    """
    cubes = [prod(shape[:-1]) * shape[-1] ** 2 for shape, symmetric in shapes.values() if symmetric]
    return sum(cubes) + sum(prod(shape) for shape, _ in shapes.values())


def assigned(
    costs: Mapping[str, int], columns: int, before: Mapping[str, int], known: Mapping[str, int]
) -> dict[str, int]:
    """The column of each block: costly ones first, each to the column with the least work so far.

    At most 4/3 of the best possible largest load (Graham, 1969). Blocks that were assigned before stay where they are.

    >>> assigned({"a": 8, "b": 5, "c": 4}, 2, {}, {})
    {'a': 0, 'b': 1, 'c': 1}

    Args:
        costs: Block -> cost of its refresh.
        columns: Number of columns.
        before: Block -> column, where it has one.
        known: Block -> cost, of those that have one.
    """
    loads = [0] * columns
    for name, column in before.items():
        loads[column] += known.get(name, 0)
    out = dict(before)
    for name, work in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        if name not in out:
            out[name] = loads.index(min(loads))
            loads[out[name]] += work
    return out
