"""Whether a saved state fits an optimizer: looked at before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from precond.distributed.sharded import local
from precond.step.adaptive_rate import CONSTANT
from precond.step.divergence import Name, all_finite
from solvers.tree import Path, pieces, place

#: Entries that a parameter has in some runs only: a clock of its own, the length of its momentum, the last move.
OCCASIONAL = {
    *("waited", "length", "move", "level", "loss", "trend", "lookahead", "radius", "members", "mean", "squares"),
}
#: Options with another meaning, or none, before they had a name in the groups.
OLDER: Mapping[str, Any] = {
    "max_ratio": None,
    "kl_unit": "curvature",
    "damping_unit": "curvature",
    "cautious": False,
    "shards": "lossless",
    "table_lr": 1.0,
    "table_ratio": math.inf,
    "warm_average": False,
    **CONSTANT,
}
#: Entry of a saved group: names of its options that followed functions of the step, whose values are those of a moment.
SCHEDULED = "scheduled"
#: Options that say what another one means.
WITH = {"damping": ("damping_unit",), "kl_clip": ("kl_unit", "kl_lr", "kl_of")}
#: What to do about a state that does not fit.
_MEND = (
    "Load the state that was saved for this model and this method (built with the same options), or begin without one. "
    "The optimizer keeps its own state."
)

State = Mapping[str, Any]
#: A parameter's state before its first step, or ``None`` where every tensor has the parameter's shape.
Expected = Callable[[Tensor, dict[str, Any]], State | None]


def require_layout(saved: Any, method: str) -> None:
    """Refuse what is no optimizer's ``state_dict``.

    Raises:
        ValueError: Saying what is missing.
    """
    if not _is_layout(saved):
        raise ValueError(
            f"{method}.load_state_dict takes what state_dict() returns: a dict with 'state' (the entries of each "
            f"parameter) and 'param_groups' (each with 'params'). This is something else. {_MEND}"
        )


def require_own(saved: Mapping[str, Any], method: str) -> None:
    """Refuse the state of another library's optimizer, of which nothing would be left but its learning rate.

    Raises:
        ValueError: If a group does not count the steps, as every one here does.
    """
    if any("steps" not in group for group in saved["param_groups"]):
        raise ValueError(
            f"{method}.load_state_dict got the state of another optimizer, such as one of torch.optim, whose averages "
            f"and learning rate mean something else. {_MEND}"
        )


def meant_before(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a state means where it is older than they are, among those of a group."""
    return {name: value for name, value in OLDER.items() if name in group}


def not_of_a_moment(group: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a group keeps, because the saved ones are momentary values of functions of the step.

    Args:
        group: As loaded; :data:`SCHEDULED` is taken away.
        own: As it was before.
    """
    names = [name for name in group.pop(SCHEDULED, "").split(",") if name in own]
    return {name: own[name] for first in names for name in (first, *WITH.get(first, ())) if name in own}


def _is_layout(saved: Any) -> bool:
    groups, state = (saved.get("param_groups"), saved.get("state")) if isinstance(saved, Mapping) else (None, None)
    if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping):
        return False
    return all(isinstance(entries, Mapping) for entries in state.values()) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups
    )


def require_fit(
    saved: Mapping[str, Any],
    groups: list[dict[str, Any]],
    expected: Expected,
    check: Callable[[dict[str, Any]], None],
    name_of: Name,
    method: str,
) -> None:
    """Refuse a state whose entries are not those of the parameters: other names, shapes or kinds of number, or NaN.

    Args:
        saved: The ``state_dict``.
        groups: The optimizer's groups.
        expected: What a parameter's state is made of.
        check: Refuses options of a group.
        name_of: Names a parameter.
        method: The optimizer's name.

    Raises:
        ValueError: Naming the parameter and the entry.
    """
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved["param_groups"]]:
        return  # torch refuses that in words
    for own, other in zip(groups, saved["param_groups"], strict=True):
        given = {name: value for name, value in other.items() if name != "params"}
        options = {**own, **meant_before(own), **given}
        check(options)
        states = [entries for number in other["params"] if (entries := saved["state"].get(number))]
        shared = {name for entries in states for name in entries if sum(name in e for e in states) > len(states) / 2}
        for p, number in zip(own["params"], other["params"], strict=True):
            if entries := saved["state"].get(number):
                wanted = expected(p, options)
                names = shared if wanted is None else {k for k, v in wanted.items() if isinstance(v, Tensor)}
                names = set() if entries.keys() <= OCCASIONAL else names - OCCASIONAL
                _require_entries(entries, p, wanted, names, f"{method}: the saved state of {name_of(p)}")
    require_finite(saved["state"], f"{method}: the saved state")


def _require_entries(entries: State, p: Tensor, expected: State | None, names: set[str], whose: str) -> None:
    shapes = None if expected is None else {k: tuple(v.shape) for k, v in expected.items() if isinstance(v, Tensor)}
    missing = sorted(names - set(entries))
    if missing:
        raise ValueError(f"{whose} has no entry {missing[0]!r}, but {', '.join(sorted(entries))}. {_MEND}")
    for name, value in entries.items():
        wanted = tuple(p.shape) if shapes is None or name not in shapes else shapes[name]
        scalar = isinstance(value, Tensor) and value.ndim == 0 and (shapes is None or name not in shapes)
        if name in (shapes or ()) and not isinstance(value, Tensor):
            raise ValueError(f"{whose} has {type(value).__name__} as {name!r}, where a tensor is expected. {_MEND}")
        if not isinstance(value, Tensor) or scalar:
            continue
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"{whose} is of another shape: {name!r} is {tuple(value.shape)}, and {wanted} is expected for a "
                f"parameter of shape {tuple(p.shape)}. {_MEND}"
            )
        if not value.is_floating_point():
            raise ValueError(f"{whose} has {name!r} in {value.dtype}, where floating numbers are expected. {_MEND}")


def require_finite(tree: Any, whose: str) -> None:
    """Refuse NaN and inf anywhere in nested values, with one wait for the device.

    Raises:
        ValueError: Naming the place.
    """
    found = list(_numbers(tree))
    broken = next((path for path, x in found if not isinstance(x, Tensor) and not math.isfinite(x)), None)
    if broken is None and all_finite([x for _, x in found if isinstance(x, Tensor)]):
        return
    if broken is None:  # here, without a message: others may have what is broken
        parts = ((path, local(x)) for path, x in found if isinstance(x, Tensor))
        broken = next((path for path, x in parts if not torch.isfinite(x).all()), None)
    where = "the part of another process" if broken is None else place(broken)
    raise ValueError(f"{whose} holds NaN or inf, in {where}. {_MEND}")


def _numbers(tree: Any) -> Iterator[tuple[Path, Any]]:
    for path, value in pieces(tree):
        if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
            yield path, value


def require_same_tree(saved: Any, again: Any, whose: str) -> None:
    """Refuse what was read only in part: what was read is not what would be saved again.

    Raises:
        ValueError: Naming the first tensor that differs.
    """
    before, after = (
        {path: tuple(value.shape) for path, value in pieces(tree) if isinstance(value, Tensor)}
        for tree in (saved, again)
    )
    for path in [*before, *after]:
        if before.get(path) != after.get(path):
            raise ValueError(
                f"{whose} is that of another method or option: {place(path)} does not belong here. {_MEND}"
            )


def unfit(whose: str, why: str) -> ValueError:
    """The error for a state that does not fit."""
    return ValueError(f"{whose} {why}. {_MEND}")
