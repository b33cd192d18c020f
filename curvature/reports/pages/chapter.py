"""What a page is made of: chapters with tables, and the meaning of the marks in their cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ERROR = "± one standard error: the truth lies within two of them in 95 % of runs."
BOUND = "± a bound: a true value lies within it."
EIGENVALUE = "± of an eigenvalue, a bound: a true eigenvalue lies within it."
STAR = "* not converged, or the search for those beyond it was not finished."


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: Its description.
        head: Names of the columns.
        rows: Cells, as many as there are names.
        words: How many columns, from the left, hold words; the others hold numbers.
        weights: How much each row matters, where there may be very many; where only some fit, these are shown.
        notes: The meaning of the marks in its cells.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    weights: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def largest(self, most: int) -> tuple[tuple[str, ...], ...]:
        """The rows that matter most, in their order."""
        weights = self.weights
        if weights is None or len(self.rows) <= most:
            return self.rows
        kept = sorted(range(len(self.rows)), key=lambda i: -weights[i])[:most]
        return tuple(self.rows[i] for i in sorted(kept))


@dataclass(frozen=True)
class Chapter:
    """A chapter.

    Attributes:
        title: Its title.
        plain: Its subject, for newcomers.
        findings: The results of this report, in sentences.
        tables: Its tables.
        plots: Names of its plots in ``curvature.reports.pages.figures``.
        expert: Definitions and methods.
    """

    title: str
    plain: str
    findings: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()


def notes(*columns: tuple[str, Iterable[str]]) -> tuple[str, ...]:
    """The meaning of the marks that cells hold: of ``±`` by the kind of number, and of ``*``.

    Args:
        columns: What ``±`` means in some cells, and these cells.
    """
    found: dict[str, None] = {}
    star = False
    for meaning, cells in columns:
        for cell in cells:
            if "±" in cell:
                found[meaning] = None
            star = star or cell.endswith("*")
    return (*found, STAR) if star else tuple(found)
