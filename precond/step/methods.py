"""The place of a method on three axes (curvature, structure, solver), and its costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
