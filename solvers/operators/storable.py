"""Operators as nested dicts of tensors and numbers, and back, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

from torch import Tensor

from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.errors import StructureError

T = TypeVar("T")

_KINDS: dict[str, type] = {}  # class name -> class


@overload
def storable(kind: type[T]) -> type[T]: ...
@overload
def storable(*, name: str) -> Callable[[type[T]], type[T]]: ...
def storable(kind: type | None = None, *, name: str = "") -> Any:
    """Class decorator: let a frozen dataclass, such as a Place of your own, be part of a stored operator.

    Its fields are tensors, numbers, strings, tuples and other storable objects.

    Args:
        kind: The class.
        name: The name it is stored under; its own by default. A class that is renamed keeps its stored name.

    Raises:
        ValueError: If another class has the name.
    """
    if kind is None:
        return partial(storable, name=name)
    name = name or kind.__name__
    if _KINDS.setdefault(name, kind) is not kind:
        raise ValueError(f"The name {name} is taken by {_KINDS[name]}.")
    return kind


def state(op: LinearOperator) -> dict[str, Any]:
    """The operator as a nested dict that ``torch.load(weights_only=True)`` reads.

    Keys are strings; values are tensors (shared with the operator, not copied), numbers, strings, dicts and lists.

    Raises:
        StructureError: If a part cannot be stored, such as a Function.
    """
    return _encode(op)


def from_state(state: dict[str, Any]) -> LinearOperator:
    """The operator that :func:`state` described.

    Raises:
        StructureError: If the dict names a class that is not known; import the module that defines it.
    """
    return _decode(state)


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    name = next((name for name, kind in _KINDS.items() if kind is type(value)), None)
    if name is None or not dataclasses.is_dataclass(value):
        raise StructureError(f"{value!r} cannot be stored. Store what it is made of, or mark its class @storable.")
    fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {"class": name} | {key: _encode(item) for key, item in fields}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    if not isinstance(value, dict):
        return value
    name = value.get("class")
    if name not in _KINDS:
        raise StructureError(f"No stored class {name!r}; known are {', '.join(sorted(_KINDS))}.")
    kind = _KINDS[name]
    fields = {key: _decode(item) for key, item in value.items() if key != "class"}
    return kind.from_fields(**fields) if issubclass(kind, LinearOperator) else kind(**fields)
