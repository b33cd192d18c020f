"""The comparison: what was found, to be printed, saved and read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from curvature.comparison.pages import page, text
from curvature.comparison.quantities import Quantity
from curvature.reports import Report
from curvature.reports.codec import encode
from solvers.files import write_text


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Reports beside each other, made by :func:`curvature.compare`.

    Attributes:
        names: Of the reports.
        reports: The reports; the first is the one that the others are compared with.
        obstacles: Why numbers differ for other reasons than the parameters of the model: other data, modes, losses.
        remarks: What else differs, and leaves the numbers comparable within their errors.
        quantities: The numbers that at least two of the reports have, with their differences.
    """

    names: tuple[str, ...]
    reports: tuple[Report, ...]
    obstacles: tuple[str, ...]
    remarks: tuple[str, ...]
    quantities: tuple[Quantity, ...]

    FORMAT: ClassVar[str] = "precond curvature comparison"
    VERSION: ClassVar[int] = 1

    def of(self, name: str, *, matrix: str | None = None, layer: str | None = None) -> tuple[Quantity, ...]:
        """The quantities of a name, of all matrices and layers or of one.

        Raises:
            KeyError: If none has it.
        """
        found = tuple(
            quantity
            for quantity in self.quantities
            if quantity.name == name and matrix in (None, quantity.matrix) and layer in (None, quantity.layer)
        )
        if not found:
            known = ", ".join(dict.fromkeys(quantity.name for quantity in self.quantities))
            where = "".join(f" of {word}" for word in (matrix, layer) if word is not None)
            raise KeyError(f"there is no {name!r}{where} in two of the reports; there are {known}.")
        return found

    def __repr__(self) -> str:
        """The names; print the comparison for its contents."""
        return f"Comparison({', '.join(self.names)}: {len(self.quantities)} quantities)"

    def __str__(self) -> str:
        """Tables, 100 columns wide."""
        return text(self.names, self.reports, self.obstacles, self.remarks, self.quantities)

    def to_html(self) -> str:
        """One page that needs nothing else; with plots where matplotlib is installed."""
        return page(self.names, self.reports, self.obstacles, self.remarks, self.quantities)

    def to_dict(self) -> dict[str, Any]:
        """Names, obstacles, remarks and quantities, as numbers, strings, lists and dictionaries."""
        rows = []
        for quantity in self.quantities:
            row = encode(quantity)
            for entry, difference in zip(row["differences"], quantity.differences, strict=True):
                if difference is not None:
                    entry |= {"in_errors": difference.in_errors, "differs": difference.differs}
            rows.append(row)
        about = {"format": self.FORMAT, "version": self.VERSION, "names": list(self.names)}
        return {**about, "obstacles": list(self.obstacles), "remarks": list(self.remarks), "quantities": rows}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the comparison: ``.html`` for people, ``.json`` for programs. A file of that name is replaced at once.

        Raises:
            ValueError: If the name ends otherwise.
            OSError: If it cannot be written; the old file is as it was.
        """
        target = Path(path)
        match target.suffix:
            case ".html":
                write_text(target, self.to_html())
            case ".json":
                write_text(target, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
            case suffix:
                raise ValueError(f"a comparison is saved as .html or .json, not {suffix or 'without a suffix'!r}.")
