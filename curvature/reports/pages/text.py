"""Chapters as text for a terminal, 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from curvature.reports.pages.chapter import Chapter, Table
from curvature.reports.pages.view import chapters, facts
from curvature.reports.results import Findings

WIDTH = 100
_LONG = 12  # rows of a long table that are shown


def text(report: Findings) -> str:
    """A report, all chapters one after the other."""
    return plain_text(f"Curvature of {report.model} under {report.loss_fn}", facts(report), chapters(report))


def plain_text(title: str, given: Sequence[tuple[str, str]], parts: Sequence[Chapter]) -> str:
    """Facts and chapters under a title."""
    lines = [title, "=" * WIDTH]
    lines += wrap("   ".join(f"{name} {value}" for name, value in given), WIDTH)
    for chapter in parts:
        lines += ["", *_chapter(chapter)]
    return "\n".join(line.rstrip() for line in lines)


def _chapter(chapter: Chapter) -> list[str]:
    lines = [chapter.title, "-" * WIDTH]
    for finding in chapter.findings:
        lines += wrap(finding, WIDTH, initial_indent="* ", subsequent_indent="  ")
    if chapter.title == "Cost":
        lines += wrap(chapter.plain, WIDTH)
    for i, table in enumerate(chapter.tables):
        lines += ([""] if i or chapter.findings else []) + _table(table)
    return lines


def _table(table: Table) -> list[str]:
    rows = table.largest(_LONG)
    widths = [_width(table, rows, i) for i in range(len(table.head))]
    last = table.words - 1  # where a table of words is too wide, its last column gives way
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    if excess > 0 and last >= 0:
        widths[last] = max(12, widths[last] - excess)

    def line(cells: tuple[str, ...]) -> list[str]:
        parts = [wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
        height = max(map(len, parts))
        padded = [part + [""] * (height - len(part)) for part in parts]
        return [
            "  ".join(
                cell.ljust(width) if i < table.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in zip(*padded, strict=True)
        ]

    lines = wrap(table.caption, WIDTH)
    if any(table.head):
        lines += line(table.head)
    for row in rows:
        lines += line(row)
    if len(rows) < len(table.rows):
        lines.append(f"... and {len(table.rows) - len(rows)} more")
    for note in table.notes:
        lines += wrap(note, WIDTH)
    return lines


def _width(table: Table, rows: tuple[tuple[str, ...], ...], i: int) -> int:
    """Of a column: its cells in one line, its name in several."""
    name = table.head[i]
    longest = max((len(word) for word in name.split()), default=0)
    return max(longest, min(12, len(name)), *(len(row[i]) for row in rows), 0)
