"""Times of the refreshes of the blocks, spread over the period."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod

from precond.distributed.assignment import shared_out
from solvers import Diagonal, Eigen, Flattened, Kronecker, LinearOperator, rule
from solvers.operators.dispatch import open_to_rules


def slots(costs: Mapping[str, int], period: int) -> dict[str, int]:
    """The step within a period at which each block is due, so that all steps cost about the same.

    By :func:`~precond.distributed.assignment.shared_out`. A pure function of names and costs, whatever their order, so
    a resumed run and all processes agree on it.

    >>> slots({"a": 8, "b": 5, "c": 4, "d": 1}, 2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}

    Args:
        costs: Block -> cost of its refresh.
        period: Steps.

    Returns:
        Block -> slot in ``range(period)``.
    """
    return dict(_slots(tuple(sorted(costs.items())), period))


@lru_cache(maxsize=64)
def _slots(costs: tuple[tuple[str, int], ...], period: int) -> tuple[tuple[str, int], ...]:
    places = shared_out([cost for _, cost in costs], [0.0] * period)
    return tuple((name, slot) for (name, _), slot in zip(costs, places, strict=True))


@open_to_rules
def refresh_cost(inverse: LinearOperator) -> int:
    """Operations of an inverse or eigendecomposition, up to a constant: the sum of ``d^3`` over its dense factors.

    A class of your own joins by ``solvers.rule(refresh_cost, MyOperator)``.

    Args:
        inverse: The inverse as it is; its shapes alone count.
    """
    return prod(inverse.in_shape[:-1]) * inverse.in_shape[-1] ** 3


@rule(refresh_cost, Kronecker)
def _cost_of_factors(inverse: Kronecker) -> int:
    return sum(map(refresh_cost, inverse.factors))


@rule(refresh_cost, Eigen)
def _cost_of_basis(inverse: Eigen) -> int:
    return refresh_cost(inverse.basis)


@rule(refresh_cost, Diagonal)
def _cost_of_entries(inverse: Diagonal) -> int:
    return prod(inverse.in_shape)


@rule(refresh_cost, Flattened)
def _cost_of_flattened(inverse: Flattened) -> int:
    return prod(inverse.in_shape) ** 3
