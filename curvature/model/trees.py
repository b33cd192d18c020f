"""Tensors in nested tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: What most arguments of functions are that are no tensors: nothing is looked for in them.
_PLAIN = frozenset((int, float, bool, str, type(None)))


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[Tensor]) -> None:
    # Runs for every call of a recorded pass: one list, and no generator for each level.
    if isinstance(tree, Tensor):
        found.append(tree)
    elif type(tree) in _PLAIN:
        return
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _gather(item, found)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _gather(item, found)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            _gather(getattr(tree, field.name), found)
