"""A table that grows by rows of named numbers, and is kept in a CSV file."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path

from solvers.files import write_text

Row = dict[str, float]


class History:
    """Rows of named numbers over the steps of a run.

    With a file, each row is written as it comes, and an existing history is continued: rows from the new row's
    step on are replaced, since they belong to a run that continued beyond its checkpoint.

    Args:
        path: CSV file with a header; ``None`` keeps rows in memory only.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path} cannot be written: there is no folder {self.path.parent}.")
        self._whole = True  # the file ends with a line that is whole
        if self.path.exists() and self.path.stat().st_size:
            self.rows = _read(self.path)
            self._whole = self.path.read_bytes().endswith(b"\n")

    @property
    def columns(self) -> list[str]:
        """Names, in the order in which they first came."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def table(self) -> dict[str, list[float]]:
        """A list for each name, all of the same length; NaN where a row lacks it."""
        return {name: [row.get(name, math.nan) for row in self.rows] for name in self.columns}

    def append(self, row: Row) -> None:
        """Add a row, which has a ``step``."""
        kept = [old for old in self.rows if old["step"] < row["step"]]
        fits = len(kept) == len(self.rows) > 0 and set(row) <= set(self.columns)
        columns = self.columns
        rows, self.rows = self.rows, [*kept, row]
        if self.path is None:
            return
        try:
            if fits and self._whole:
                self._add(self.path, _lines([[_written(row, name) for name in columns]]))
            else:  # a new column, outdated rows, or half a line
                table = [self.columns, *([_written(old, name) for name in self.columns] for old in self.rows)]
                write_text(self.path, _lines(table))
                self._whole = True
        except BaseException:
            self.rows = rows
            raise

    def _add(self, path: Path, line: str) -> None:
        """Write a line at the end, or leave the file as it was."""
        with open(path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                content = memoryview(line.encode())
                while content:
                    content = content[file.write(content) :]
            except BaseException:
                self._whole = False
                file.truncate(end)
                self._whole = True
                raise


def _lines(rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _written(row: Row, name: str) -> str:
    return repr(row[name]) if name in row else ""


def _read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    columns, *body = lines
    if "step" not in columns:
        raise ValueError(f"{path} is no history: it has no column 'step'. Name another file.")
    try:
        # A process killed while writing leaves half a line.
        return [
            {name: _number(cell) for name, cell in zip(columns, line, strict=True) if cell}
            for line in body
            if len(line) == len(columns) and line[columns.index("step")]
        ]
    except ValueError as error:
        raise ValueError(f"{path} is no history: {error}. Name another file.") from error


def _number(cell: str) -> float:
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)
