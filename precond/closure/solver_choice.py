"""Which solver a linear least-squares problem of some size is given, and why."""

from __future__ import annotations

from dataclasses import dataclass

#: Numbers in a Jacobian and in its Gram matrix, at most: 4 GiB in float64.
LARGEST = 2**29


@dataclass(frozen=True)
class SolverChoice:
    """The solver of a step.

    Attributes:
        solver: ``"cholesky"``, ``"woodbury"``, ``"kfac"``, ``"nystrom"`` or ``"cg"``.
        reason: Why, with the sizes.
    """

    solver: str
    reason: str


def cheapest(rows: int, parameters: int, largest: int = LARGEST) -> SolverChoice:
    """The direct solver that costs less, or products alone where the Jacobian would be too large.

    Args:
        rows: R, residuals.
        parameters: P.
        largest: Numbers that may be formed.
    """
    sizes = f"{rows:,} residuals, {parameters:,} parameters"
    few, many = min(rows, parameters), max(rows, parameters)
    numbers = few * many + 2 * few**2
    if numbers > largest:
        return SolverChoice(
            "nystrom",
            f"{sizes}: the Jacobian and its Gram matrix would hold {numbers:,} numbers, more than {largest:,}, so "
            "products with it are used alone",
        )
    name, other = ("woodbury", "cholesky") if rows < parameters else ("cholesky", "woodbury")
    cost, more = (many * n**2 if n == few else few * n**2 for n in (few, many))
    return SolverChoice(
        name,
        f"{sizes}: {name} takes {cost + few**3 // 3:,} operations, {other} {more + many**3 // 3:,}",
    )
