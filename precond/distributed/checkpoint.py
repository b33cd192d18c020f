"""State in the form that ``torch.distributed.checkpoint`` can restore: it fills the template of a fresh optimizer.

A loader of that kind reads only what the template names, and drops the rest without a word. Blocks of layers, clocks
and counts appear during training, so no fresh optimizer can name them. Asked by that loader, a state therefore has
entries that are known in advance, and one more that holds all others: :class:`Packed`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from solvers.tree import map_tree

#: Name of the entry that holds those that a template cannot name.
PACKED = "packed"
#: Option of the first group in a ``state_dict``: the number of entries that belong to it.
COUNT = "entries"
#: Option of the first group in a ``state_dict``: the method that saved it.
METHOD = "method"
_CHECKPOINT = "torch.distributed.checkpoint"


class Packed(int):
    """Entries of a state in one piece: a number, so that ``torch.distributed.checkpoint`` takes it as a leaf.

    Its nested form goes into dicts, and its flat one takes numbers and tensors only. The value is the number of
    entries.

    Args:
        entries: Nested dicts and lists of tensors and numbers; tensors are copied to the CPU.
    """

    entries: dict[str, Any]

    def __new__(cls, entries: Mapping[str, Any] | None = None) -> Packed:
        packed = super().__new__(cls, len(entries or {}))
        packed.entries = map_tree(_on_cpu, entries or {})
        return packed

    def __reduce__(self) -> tuple[type[Packed], tuple[dict[str, Any]]]:
        return Packed, (self.entries,)

    def __repr__(self) -> str:
        return f"Packed({', '.join(self.entries)})"


torch.serialization.add_safe_globals([Packed])  # torch.load(weights_only=True) reads it


def _on_cpu(piece: Any, path: Any) -> Any:
    return piece.detach().to("cpu", copy=True) if isinstance(piece, Tensor) else NotImplemented


def asked_by_checkpoint() -> bool:
    """Whether ``torch.distributed.checkpoint`` is among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_CHECKPOINT):
            return True
        frame = frame.f_back
    return False


def packed(entries: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a parameter's state under the names of a template, and all others as :data:`PACKED`.

    Args:
        entries: The parameter's state.
        template: The state with which a parameter begins, for entries that it does not have yet.
    """
    rest = {name: value for name, value in entries.items() if name not in template and name != PACKED}
    return {**{name: entries.get(name, first) for name, first in template.items()}, PACKED: Packed(rest)}


def marked(saved: dict[str, Any], trained: set[int], method: str) -> None:
    """Write into the first group which method saved it, and how many entries the state of trained parameters has.

    Args:
        saved: A ``state_dict``; changed.
        trained: Numbers of the parameters that are not frozen; a loader may leave out the others.
        method: Its name.
    """
    number = _number(entries for key, entries in saved["state"].items() if key in trained)
    saved["param_groups"][0].update({COUNT: number, METHOD: method})


def unpacked(saved: Any, method: str) -> Any:
    """A ``state_dict`` without :data:`PACKED`, :data:`COUNT` and :data:`METHOD`: all entries under their own names.

    Raises:
        ValueError: If another method saved it, or if entries are missing, because a loader filled a template that did
            not name them.
    """
    state, groups = (saved.get("state"), saved.get("param_groups")) if isinstance(saved, Mapping) else (None, None)
    if not isinstance(state, Mapping) or not (isinstance(groups, (list, tuple)) and groups):
        return saved
    if not all(isinstance(part, Mapping) for part in (*state.values(), *groups)):
        return saved
    if (other := groups[0].get(METHOD, method)) != method:
        raise ValueError(
            f"{method}.load_state_dict got the state of another method, {other}: their options and averages differ. "
            f"Load it into {other}, or begin without a state. The optimizer keeps its own state."
        )
    state = _rejoined(state)
    expected, found = groups[0].get(COUNT, 0), _number(state.values())
    if found < expected:
        raise ValueError(
            f"{method}: the saved state holds {found} of its {expected} entries. A loader that fills the state of a "
            "fresh optimizer, as torch.distributed.checkpoint does, drops what that one does not have yet. Save and "
            "load what torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives, or the optimizer itself "
            "(dcp.save({'optimizer': optimizer})). To load a part on purpose, remove "
            f"state_dict['param_groups'][0][{COUNT!r}]."
        )
    groups = [{name: value for name, value in group.items() if name not in (COUNT, METHOD)} for group in groups]
    return {**saved, "state": {key: _whole(entries) for key, entries in state.items()}, "param_groups": groups}


def _rejoined(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of each parameter together: a loader writes what is no tensor under the number as a string."""
    apart = {key: int(key) for key in state if isinstance(key, str) and key.isdecimal() and int(key) in state}
    out = {key: entries for key, entries in state.items() if key not in apart}
    return {**out, **{number: {**state[number], **state[key]} for key, number in apart.items()}}


def _whole(entries: Mapping[str, Any]) -> dict[str, Any]:
    """All entries of a parameter; the flat form stands an empty dict for one that the checkpoint does not have."""
    rest = entries.get(PACKED)
    own = {name: value for name, value in entries.items() if name != PACKED and not _empty(value)}
    return {**own, **(map_tree(_copied, rest.entries) if isinstance(rest, Packed) else {})}


def _copied(piece: Any, path: Any) -> Any:
    return piece.clone() if isinstance(piece, Tensor) else NotImplemented


def _empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _number(states: Any) -> int:
    return sum(1 for entries in states for _ in _names(entries))


def _names(entries: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in entries.items():
        if name == PACKED:
            yield from _names(value.entries if isinstance(value, Packed) else {})
        elif name == "blocks":  # of layers, one by one
            yield from value
        elif not _empty(value):
            yield name
