"""The structured curvature of a problem, as the tests compare it."""

from __future__ import annotations

from typing import Any

from curvature import fisher
from solvers import BlockDiagonal
from tests.curvature.problems import Problem


def estimate(problem: Problem, structure: Any, kind: Any = "exact", **options: Any) -> BlockDiagonal:
    out = fisher(
        problem.model,
        problem.loss_fn,
        problem.data,
        kind=kind,
        structure=structure,
        class_dim=problem.class_dim,
        **options,
    )
    assert isinstance(out, BlockDiagonal)
    return out
