"""Options of parameter groups that are functions of the step count, and one that many have: periods that double."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: A number, or a function of the count of steps taken before, which is 0 for the first step.
Scheduled = float | Callable[[int], float]

#: A whole number, or a function of the count of steps taken before.
ScheduledInt = int | Callable[[int], int]

#: Options that decide the kind of an update, the shape of the state, or the divisor of an average.
FIXED = frozenset(
    {
        *("maximize", "nesterov", "decay", "grafting", "scaling", "polynomial", "orthogonalize", "stacked"),
        *("eigenvalue_correction", "max_dim", "merge_dims", "block_size", "rotate_vectors", "rank", "window"),
        *("betas", "average_decay", "vector_betas", "hyperball", "floor_rows", "lookahead_decay"),
        *("shards", "warm_average"),
    }
)


@dataclass(frozen=True)
class Doubling:
    """A period that doubles with the steps taken up to its final length: due at steps 0, 1, 2, 4, 8, ...

    The first statistics are poor and change fast, the later ones are good and change slowly; a few early
    refreshes cost as much as a few periods. A schedule for ``inverse_update_period`` and ``curvature_update_period``.
    Methods that use gradients alone count the step itself: they refresh in the steps 1, 2, 4, 8, 20, 30, ... of
    ``Doubling(10)``.

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


def split(
    group: dict[str, Any], fixed: frozenset[str] = FIXED
) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
    """The plain options of a group, and those that are schedules.

    Args:
        group: Options.
        fixed: Those that must not change.

    Raises:
        TypeError: If an option that must not change is a function, or ``lr`` is.
    """
    schedules = {name: value for name, value in group.items() if name != "params" and callable(value)}
    if "lr" in schedules:
        raise TypeError("lr is a number; to change it over the steps use one of torch.optim.lr_scheduler.")
    for name in schedules:
        if name in fixed:
            raise TypeError(f"{name} cannot follow a function of the step here; give its value.")
    return {name: value for name, value in group.items() if name not in schedules}, schedules


def value_at(name: str, schedule: Callable[[int], Any], step: int) -> Any:
    """The value of a schedule at a step: a number, a tuple of numbers, or ``None``.

    Raises:
        TypeError: If it gives something else.
    """
    try:
        value = schedule(step)
    except Exception as error:
        error.add_note(f"(in the schedule of {name}, at step {step})")
        raise
    value = value.item() if hasattr(value, "item") else value  # converts numbers of torch and numpy
    entries = value if isinstance(value, (tuple, list)) else (value,)
    if value is None or all(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in entries):
        return value
    raise TypeError(f"the schedule of {name} must give a number; at step {step} it gave {value!r}.")


def numbers_at(
    group: dict[str, Any],
    schedules: dict[str, Callable[[int], Any]],
    step: int,
    check: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The values of a group's schedules at a step, checked beside its other options.

    Raises:
        ValueError: If ``check`` does.
    """
    if not schedules:
        return {}
    numbers = {name: value_at(name, schedule, step) for name, schedule in schedules.items()}
    try:
        check({**group, **numbers})
    except ValueError as error:
        blamed = [name for name in schedules if re.search(rf"\b{name}\b", str(error))]
        if not blamed:
            raise
        raise ValueError(f"{error} (At step {step}, by the schedule given for {', '.join(blamed)}.)") from error
    return numbers


def at_start(value: Any) -> Any:
    """The value of an option before the first step, whether it is a schedule or not."""
    return value_at("an option", value, 0) if callable(value) else value
