"""Every optimizer on three axes (curvature, structure, solver), with its costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from precond.step.base import SecondOrderOptimizer

Matrix = Literal["Hessian", "GGN", "Fisher", "gradient second moment"]
Form = Literal["dense", "low rank", "Kronecker", "Kronecker eigenbasis", "diagonal", "matrix-free"]


@dataclass(frozen=True)
class Taxonomy:
    """Place of a method among the others, and its costs; the class attribute ``taxonomy`` of each.

    Costs are leading terms for a weight of m outputs and n inputs; B is the number of rows that a layer sees in a batch
    (examples times positions), P that of all parameters.

    Args:
        curvature: The matrix that is estimated, such as "Fisher (mc)" or "gradient second moment".
        structure: The form it is kept in.
        solver: How it is inverted or rooted.
        matrices: The first axis: the kind of matrix, several where there is a choice.
        forms: The second axis: the kind of structure.
        step: Floating-point operations of a step, beyond the gradient and elementwise work.
        refresh: Those of an update of the curvature.
        memory: Numbers that are kept, beyond parameters and momentum.
        paper: Source.
    """

    curvature: str
    structure: str
    solver: str
    matrices: tuple[Matrix, ...]
    forms: tuple[Form, ...]
    step: str
    refresh: str
    memory: str
    paper: str


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
