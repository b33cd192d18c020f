"""Operators as nested dicts of tensors and numbers, and back, bit for bit."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

from torch import Tensor

from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import instance
from solvers.outcome.errors import StructureError
from solvers.tree import Path, map_inside, map_tree, place

T = TypeVar("T")

_KINDS: dict[str, type] = {}  # class name -> class
_HOMES: dict[str, str] = {}  # class name -> module that defines it, of packages that import their modules late


@overload
def storable(kind: type[T]) -> type[T]: ...
@overload
def storable(*, name: str) -> Callable[[type[T]], type[T]]: ...
def storable(kind: type | None = None, *, name: str = "") -> Any:
    """Class decorator: let a frozen dataclass, such as your own Place, be part of a stored operator.

    Its fields are tensors, numbers, strings, tuples and other storable objects.

    Args:
        kind: The class.
        name: The name it is stored under; its own by default. A class that is renamed keeps its stored name.

    Raises:
        ValueError: If another class has the name.
    """
    instance("name", name, str, "a string")
    if kind is None:
        return partial(storable, name=name)
    instance("kind", kind, type, "a class")
    name = name or kind.__name__
    if _KINDS.setdefault(name, kind) is not kind:
        raise ValueError(f"The name {name} is taken by {_KINDS[name]}.")
    return kind


def stored_in(module: str, *names: str) -> None:
    """Say which module defines stored classes, so that :func:`from_state` finds them before anything imported it."""
    _HOMES.update(dict.fromkeys(names, module))


def state(op: LinearOperator) -> dict[str, Any]:
    """The operator as a nested dict that ``torch.load(weights_only=True)`` reads.

    Keys are strings; values are tensors (shared with the operator, not copied), numbers, strings, dicts and lists.

    Raises:
        StructureError: If a part cannot be stored, such as a Function.
    """
    instance("op", op, LinearOperator, "a LinearOperator such as Dense(matrix)")
    return map_tree(_stored, op, sequence=list)


def from_state(state: dict[str, Any]) -> LinearOperator:
    """The operator that :func:`state` described.

    Raises:
        StructureError: If the dict names a class that is not known; import the module that defines it.
    """
    instance("state", state, dict, "the dict that solvers.state gave")
    return map_tree(_restored, state, sequence=tuple)


def _stored(piece: Any, path: Path) -> Any:
    if piece is None or isinstance(piece, (Tensor, bool, int, float, str, list, tuple)):
        return NotImplemented
    name = next((name for name, kind in _KINDS.items() if kind is type(piece)), None)
    if name is None or not dataclasses.is_dataclass(piece):
        raise StructureError(
            f"{piece!r} at {place(path)} cannot be stored. Store what it is made of, or mark its class @storable."
        )
    fields = {field.name: getattr(piece, field.name) for field in dataclasses.fields(piece)}
    return {"class": name} | map_inside(_stored, fields, path, list)


def _restored(piece: Any, path: Path) -> Any:
    if not isinstance(piece, dict):
        return NotImplemented
    name = piece.get("class")
    if name not in _KINDS and name in _HOMES:
        importlib.import_module(_HOMES[name])
    if name not in _KINDS:
        raise StructureError(f"No stored class {name!r}; known are {', '.join(sorted({*_KINDS, *_HOMES}))}.")
    kind = _KINDS[name]
    fields = map_inside(_restored, {key: item for key, item in piece.items() if key != "class"}, path, tuple)
    return kind.from_fields(**fields) if issubclass(kind, LinearOperator) else kind(**fields)
