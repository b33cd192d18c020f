"""What every optimizer here is, on three axes: curvature, structure, solver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from precond.base import SecondOrderOptimizer


@dataclass(frozen=True)
class Taxonomy:
    """Where a method stands among the others; the class attribute ``taxonomy`` of each.

    Args:
        curvature: The matrix that is estimated, such as "Fisher (mc)" or "gradient second moment".
        structure: The form it is kept in.
        solver: How it is inverted or rooted.
        paper: Source.
    """

    curvature: str
    structure: str
    solver: str
    paper: str


@dataclass(frozen=True)
class Method:
    """A method of this package.

    Args:
        name: Name of its class.
        cls: The class.
        needs: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
        curvature: See :class:`Taxonomy`; so are the others.
        structure: Form of the curvature.
        solver: How it is inverted or rooted.
        paper: Source.
    """

    name: str
    cls: type[SecondOrderOptimizer]
    needs: str
    curvature: str
    structure: str
    solver: str
    paper: str


def methods() -> list[Method]:
    """All methods of this package, by name.

    >>> [method.needs for method in methods() if method.name == "SOAP"]
    ['grad']
    """
    found = set()  # a class with two bases is a subclass of both
    for cls in _subclasses(SecondOrderOptimizer):  # type: ignore[type-abstract]
        taxonomy: Any = vars(cls).get("taxonomy")
        if isinstance(taxonomy, Taxonomy) and cls.__module__.partition(".")[0] == "precond":
            found.add(Method(cls.__name__, cls, cls.needs, **vars(taxonomy)))
    return sorted(found, key=lambda method: method.name)


def _subclasses(cls: type[SecondOrderOptimizer]) -> Iterator[type[SecondOrderOptimizer]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
