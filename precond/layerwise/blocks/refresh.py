"""Times of the refreshes of the blocks: dense at first, and spread over the period."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from precond.distributed.assignment import shared_out
from solvers import Diagonal, Eigen, Flattened, Kronecker, LinearOperator, rule
from solvers.operators.dispatch import open_to_rules


@dataclass(frozen=True)
class Doubling:
    """A period that doubles with the steps taken up to its final length: due at steps 0, 1, 2, 4, 8, ...

    The first statistics are poor and change fast, the later ones are good and change slowly; a few early
    refreshes cost as much as a few periods. A schedule for ``inverse_update_period`` and ``curvature_update_period``.

    >>> [step for step in range(50) if step % Doubling(10)(step) == 0]
    [0, 1, 2, 4, 8, 10, 20, 30, 40]

    Args:
        period: The final period.

    Raises:
        ValueError: If it is not a positive whole number.
    """

    period: int

    def __post_init__(self) -> None:
        """Validate the period."""
        if not isinstance(self.period, int) or isinstance(self.period, bool) or not 1 <= self.period < 2**63:
            raise ValueError(f"a period is a whole number of steps, at least 1; got {self.period!r}.")

    def __call__(self, step: int) -> int:
        """The period at a step: the largest power of two not beyond it, and in the end the final one."""
        return self.period if step >= self.period else 1 << (max(step, 1).bit_length() - 1)


#: Default period of the inverses of layer-based methods.
DOUBLING_TO_10 = Doubling(10)
#: Default period of the statistics of those that keep Kronecker factors.
DOUBLING_TO_5 = Doubling(5)


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
