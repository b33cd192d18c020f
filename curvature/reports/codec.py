"""Frozen dataclasses to plain data and back."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from solvers.tree import Path, map_inside, map_tree


def encode(value: Any) -> Any:
    """Dataclasses and tuples as dictionaries and lists."""
    return map_tree(_fields, value, sequence=list)


def _fields(piece: Any, path: Path) -> Any:
    if not dataclasses.is_dataclass(piece) or isinstance(piece, type):
        return NotImplemented
    fields = {field.name: getattr(piece, field.name) for field in dataclasses.fields(piece) if field.repr}
    return map_inside(_fields, fields, path, list)


def decode(kind: Any, value: Any) -> Any:
    """Rebuild a value of type ``kind`` from the result of :func:`encode`.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else decode(inner, value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        known = {field.name: field for field in dataclasses.fields(kind) if field.repr}
        needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        if not isinstance(value, dict) or not needed <= set(value) <= set(known):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{kind.__name__} has the fields {sorted(known)}, not {found}.")
        return kind(**{name: decode(hints[name], entry) for name, entry in value.items()})
    if origin is dict:
        return {key: decode(arguments[1], entry) for key, entry in value.items()}
    if origin is tuple:
        inners = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(decode(inner, entry) for inner, entry in zip(inners, value, strict=True))
    return float(value) if kind is float else value
