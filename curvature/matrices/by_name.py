"""The matrices of a loss by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from curvature.matrices.dataset_operator import DatasetOperator
from curvature.matrices.ggn import ggn
from curvature.matrices.hessian import hessian

Matrix = Literal["hessian", "ggn"]
#: Name -> maker of the matrix-free operator of a loss over data.
MATRICES: dict[Matrix, Callable[..., DatasetOperator]] = {"hessian": hessian, "ggn": ggn}


def matrix_of(name: Matrix) -> Callable[..., DatasetOperator]:
    """The maker of the matrix of that name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in MATRICES:
        raise ValueError(f"matrix must be {' or '.join(map(repr, MATRICES))}, got {name!r}.")
    return MATRICES[name]
