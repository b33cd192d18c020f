"""Every optimizer of this package, with its place among the others."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from precond import closure, gradient, layerwise
from precond.step.base import SecondOrderOptimizer
from precond.step.methods import Taxonomy


@dataclass(frozen=True)
class Method(Taxonomy):
    """A method of this package: its :class:`Taxonomy`, and its class.

    Args:
        name: Name of its class.
        cls: The class.
        needs: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    """

    name: str
    cls: type[SecondOrderOptimizer]
    needs: str


def methods() -> list[Method]:
    """All methods of this package, by name.

    >>> [method.needs for method in methods() if method.name == "SOAP"]
    ['grad']
    """
    for family in (closure, gradient, layerwise):  # a class is known once its file has been imported
        for file in pkgutil.iter_modules(family.__path__, f"{family.__name__}."):
            importlib.import_module(file.name)
    found = set()  # a class with two bases is a subclass of both
    for cls in _subclasses(SecondOrderOptimizer):  # type: ignore[type-abstract]
        taxonomy: Any = vars(cls).get("taxonomy")
        if isinstance(taxonomy, Taxonomy) and cls.__module__.partition(".")[0] == "precond":
            found.add(Method(**vars(taxonomy), name=cls.__name__, cls=cls, needs=cls.needs))
    return sorted(found, key=lambda method: method.name)


def _subclasses(cls: type[SecondOrderOptimizer]) -> Iterator[type[SecondOrderOptimizer]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
