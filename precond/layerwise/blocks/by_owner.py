"""What the owners of sharded parameters compute for all processes: directions, and what is measured of momenta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from precond.distributed.assignment import blocks_together
from precond.distributed.curvature import SharedCurvature
from precond.distributed.exchange import Exchange
from precond.distributed.sharded import local
from precond.layerwise.blocks.by_name import Preconditioners


def directions_by_owners(
    shared: SharedCurvature,
    blocks: Preconditioners,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    given: Mapping[Tensor, Tensor],
    plain: Callable[[str, Tensor], None],
) -> dict[Tensor, Tensor]:
    """``P g`` of every parameter, by the process that keeps its blocks; see :mod:`precond.distributed.exchange`.

    Args:
        shared: The processes.
        blocks: The blocks.
        parameters: The tracked parameters by name.
        gradients: Their gradients, cut as they are.
        given: The gradients of all parameters, others included, which go through as they are.
        plain: Told of each gradient, or part of one, that goes through as it is.
    """
    columns = shared.owners(blocks, gradients.keys())
    names = {parameters[name]: name for name in gradients}

    def compute(here: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        whole = {name: here[p] for p, name in names.items() if p in here and name in columns}
        results, unchanged = blocks.apply(whole, {}, [])
        for name, rest in unchanged.items():
            plain(name, rest)
        for p, g in here.items():
            if p in names and names[p] not in columns:
                plain(names[p], g)
        return {p: results[names[p]] if names.get(p) in results else g.clone() for p, g in here.items()}

    parts = {name: block.estimator.block.names for name, block in blocks.items()}
    first = {parameters[n]: names[0] for names in blocks_together(parts) for n in chain(*(parts[b] for b in names))}
    exchange = Exchange({parameters[name]: column for name, column in columns.items()})
    return exchange.through(given, compute, lambda p: first.get(p))


def momenta_at_owners(
    shared: SharedCurvature,
    blocks: Preconditioners,
    parameters: Mapping[str, Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    new: set[str],
) -> dict[str, Tensor]:
    """The momenta of blocks whose metric is new, or that were never measured, whole where the blocks are kept.

    Args:
        shared: The processes.
        blocks: The blocks.
        parameters: The tracked parameters by name.
        state: Of the parameters.
        new: Names of the blocks with a new metric.
    """
    due: dict[str, Tensor] = {}
    columns = shared.owners(blocks, parameters.keys())
    for name in sorted(blocks):
        states = {n: state.get(parameters[n], {}) for n in blocks[name].estimator.block.names if n in columns}
        momenta = {n: s["momentum_buffer"] for n, s in states.items() if "momentum_buffer" in s}
        if name in new or any("length" not in states[n] for n in momenta):
            due |= momenta
    exchange = Exchange({parameters[n]: columns[n] for n in due})
    found = exchange.gathered({parameters[n]: local(v) for n, v in due.items()})
    return {n: found[parameters[n]] for n in due if parameters[n] in found}
