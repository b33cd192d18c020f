"""Which processes keep which blocks: a function of names and shapes, on which all agree without a word."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod


def cost(shapes: Mapping[str, tuple[tuple[int, ...], bool]]) -> int:
    """Operations of a refresh, up to a constant: ``d^3`` for each symmetric matrix, and the number of all entries.

    Args:
        shapes: Sum -> its shape, and whether it is a stack of symmetric matrices.
    """
    cubes = [prod(shape[:-1]) * shape[-1] ** 2 for shape, symmetric in shapes.values() if symmetric]
    return sum(cubes) + sum(prod(shape) for shape, _ in shapes.values())


def shared_out(works: Sequence[float], loads: list[float]) -> list[int]:
    """Who takes which piece of work: large ones first, each to who has the least so far.

    At most 4/3 of the best possible largest load (Graham, 1969). Work that comes later leaves that from before where it
    is, so that parameters which are added to an optimizer move none of the others.

    >>> loads = [0.0, 0.0]
    >>> shared_out([4, 8, 5], loads), loads
    ([1, 0, 1], [8.0, 9.0])

    Args:
        works: The pieces.
        loads: What everybody has so far; changed.
    """
    out = [0] * len(works)
    for index in sorted(range(len(works)), key=lambda i: -works[i]):
        out[index] = loads.index(min(loads))
        loads[out[index]] += works[index]
    return out


def assigned(
    costs: Mapping[str, int],
    columns: int,
    before: Mapping[str, int],
    known: Mapping[str, int],
    parts: Mapping[str, Collection[str]] | None = None,
) -> dict[str, int]:
    """The column of each block, by :func:`shared_out`. Blocks that were assigned before stay where they are.

    >>> assigned({"a": 8, "b": 5, "c": 4}, 2, {}, {})
    {'a': 0, 'b': 1, 'c': 1}
    >>> assigned({"a": 8, "b": 5, "c": 4}, 2, {}, {}, {"a": ["p"], "b": ["q"], "c": ["p", "r"]})
    {'b': 1, 'a': 0, 'c': 0}

    Args:
        costs: Block -> cost of its refresh.
        columns: Number of columns.
        before: Block -> column, where it has one.
        known: Block -> cost, of those that have one.
        parts: Block -> its parameters, of all blocks there are now: those that share one are kept together.

    Raises:
        RuntimeError: If blocks that are to be kept together were assigned to several columns before.
    """
    loads = [0.0] * columns
    for name, column in before.items():
        loads[column] += known.get(name, 0)
    new = sorted(costs.keys() - before.keys())
    if parts is None or not new:
        return {**before, **dict(zip(new, shared_out([costs[name] for name in new], loads), strict=True))}
    out = dict(before)
    free: list[list[str]] = []
    for names in blocks_together(parts):
        places = {before[name] for name in names if name in before}
        if len(places) > 1:
            raise RuntimeError(
                f"blocks {', '.join(names)} share a parameter now, and are kept by several processes. Make the "
                "optimizer again, and load its state_dict()."
            )
        fresh = [name for name in names if name in costs and name not in before]
        if places:
            (place,) = places
            out |= dict.fromkeys(fresh, place)
            loads[place] += sum(costs[name] for name in fresh)
        elif fresh:
            free.append(fresh)
    columns_of = shared_out([sum(costs[name] for name in names) for names in free], loads)
    return out | {name: column for names, column in zip(free, columns_of, strict=True) for name in names}


def blocks_together(parts: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Blocks that share parameters, directly or through others."""
    groups: dict[str, tuple[list[str], list[str]]] = {}  # by its last block: parameters and blocks
    home: dict[str, str] = {}  # parameter -> its group
    for name in sorted(parts):
        mine, names = list(parts[name]), [name]
        touched = {home[p] for p in mine if p in home}
        for old in [group for group in groups if group in touched] if touched else ():
            params, others = groups.pop(old)
            mine, names = mine + params, [*others, *names]
        groups[name] = mine, names
        home |= dict.fromkeys(mine, name)
    return [names for _, names in groups.values()]
