"""Results as text for people and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from solvers import Density, Eigenpairs, Estimate
from solvers.tree import Path, map_tree

_BAR = 50  # characters of the longest bar
_ROWS = 24


def to_json(content: Any) -> str:
    """JSON by its standard: numbers that are not finite become null."""
    return json.dumps(map_tree(_finite, content, sequence=list), indent=1, allow_nan=False)


def _finite(piece: Any, path: Path) -> Any:
    if isinstance(piece, Tensor):
        return map_tree(_finite, piece.tolist())
    return None if isinstance(piece, float) and not math.isfinite(piece) else NotImplemented


def eigenvalues(pairs: Eigenpairs) -> str:
    """A row for each eigenvalue."""
    rows = [
        (str(i), f"{value:#.6g}", f"{residual:.1e}", "" if good else "not converged")
        for i, (value, residual, good) in enumerate(
            zip(pairs.values.tolist(), pairs.residuals.tolist(), pairs.converged.tolist(), strict=True), 1
        )
    ]
    lines = table(("", "eigenvalue", "residual", ""), rows)
    return "\n".join([*lines, "", "Each is within its residual of an eigenvalue."])


def density(found: Density) -> str:
    """The density as bars on a logarithmic scale, and the means of powers of the eigenvalues."""
    step = max(1, math.ceil(len(found.grid) / _ROWS))
    parts = [slice(start, start + step) for start in range(0, len(found.grid), step)]
    points = [float(found.grid[part].mean()) for part in parts]
    heights = [float(found.density[part].mean()) for part in parts]
    highest = max(heights)
    lines = table(
        ("eigenvalue", "density", "logarithmic, from 1e-6 of the highest"),
        [
            (f"{point:.4g}", f"{height:.2e}", "#" * round(_BAR * max(0.0, 1 + math.log10(height / highest) / 6)))
            if height > 0
            else (f"{point:.4g}", "0", "")
            for point, height in zip(points, heights, strict=True)
        ],
        left=(2,),
    )
    mean, square = (float(found.moments.value[i]) for i in range(2))
    errors = [float(found.moments.stderr[i]) for i in range(2)]
    return "\n".join(
        [
            *lines,
            "",
            f"mean of the eigenvalues {number(mean, errors[0])}, of their squares {number(square, errors[1])}; details "
            f"below {found.width:.2g} are smoothed away.",
        ]
    )


def estimate(name: str, found: Estimate) -> str:
    """One number with its error."""
    value, error = float(found.value), float(found.stderr)
    if error == 0:
        return f"{name} {value:.8g}, exact"
    return f"{name} {number(value, error)} (standard error; {found.samples} products)"


def number(value: float, error: float) -> str:
    """A number, with the digits that its error leaves."""
    if not (error > 0 and math.isfinite(error) and math.isfinite(value)):
        return f"{value:.6g}" if error == 0 else f"{value:.6g} +- {error:.2g}"
    digits = max(2, min(12, math.floor(math.log10(max(abs(value), error) / error)) + 2))
    return f"{value:.{digits}g} +- {error:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Lines of a table, columns to the right but for those of ``left``."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i in left or i == len(row) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(head), *map(line, rows)]
