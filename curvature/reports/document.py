"""The report: findings that can be printed, saved and loaded."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from curvature.estimation.checkpoint import CheckpointError, load, save
from curvature.reports.codec import decode, encode
from curvature.reports.pages.page import page
from curvature.reports.pages.text import text
from curvature.reports.results import Findings, Refusal
from solvers.files import write_text
from solvers.outcome.memory import is_out_of_memory


@dataclass(frozen=True, eq=False, repr=False)
class Report(Findings):
    """The curvature of one loss of one model, made by :func:`curvature.report`: findings to print, save and load."""

    FORMAT: ClassVar[str] = "precond curvature report"
    VERSION: ClassVar[int] = 1

    def __repr__(self) -> str:
        """The subject of the report; print it for its contents."""
        return f"Report({self.model}, {self.loss_fn}, {self.parameters} parameters, {self.created})"

    def __str__(self) -> str:
        """Tables, 100 columns wide."""
        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the eigenvectors, as numbers, strings, lists and dictionaries."""
        return {"format": self.FORMAT, "version": self.VERSION, **encode(self)}

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """The report of :meth:`to_dict`.

        Raises:
            ValueError: If it is something else, was written by another version, or differs from the digest that
                :meth:`save` wrote beside it; older files have none.
        """
        if not isinstance(content, dict) or content.get("format") != cls.FORMAT:
            raise ValueError("this is no curvature report: it lacks the mark of Report.to_dict().")
        content = dict(content)
        seal = content.pop(_SEAL, None)
        if seal is not None and seal != _digest(content):
            raise ValueError("this report is damaged: its contents are not those that were written.")
        if content.get("version") != cls.VERSION:
            raise ValueError(f"this report has the version {content.get('version')}; {cls.VERSION} can be read.")
        return decode(cls, {key: value for key, value in content.items() if key not in ("format", "version")})

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON (RFC 8259): no NaN, no infinity."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, content: str) -> Report:
        """The report of :meth:`to_json`, without eigenvectors."""
        return cls.from_dict(json.loads(content))

    def to_html(self) -> str:
        """One page that needs nothing else; with plots where matplotlib is installed."""
        return page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: ``.html`` for people, ``.json`` for programs, ``.pt`` with the eigenvectors.

        A file of that name is replaced at once, or not at all. ``.json`` and ``.pt`` carry a digest of what they hold.
        Of the processes of a ``process_group``, which have the same report, the first one writes.

        Raises:
            ValueError: If the name ends otherwise.
            OSError: If it cannot be written; the old file is as it was.
        """
        target = Path(path)
        if not self.writes and target.suffix in (".html", ".json", ".pt"):
            return
        match target.suffix:
            case ".html":
                write_text(target, self.to_html())
            case ".json":
                content = self.to_dict()
                sealed = content | {_SEAL: _digest(content)}
                write_text(target, json.dumps(sealed, indent=1, allow_nan=False) + "\n")
            case ".pt":
                save(target, {"report": self.to_dict(), "eigenvectors": self.eigenvectors})
            case suffix:
                raise ValueError(f"a report is saved as .html, .json or .pt, not {suffix or 'without a suffix'!r}.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a ``.json`` or ``.pt`` file of :meth:`save`.

        Raises:
            ValueError: If the name ends otherwise.
            CheckpointError: If it is something else, or damaged.
        """
        source = Path(path)
        if source.suffix not in (".json", ".pt"):
            raise ValueError(f"a report is loaded from .json or .pt, not {source.name!r}.")
        try:
            if source.suffix == ".json":
                return cls.from_json(source.read_bytes().decode())
            content = load(source)
            if not isinstance(content, dict) or content.keys() != {"report", "eigenvectors"}:
                raise ValueError("it lacks the parts of one")
            found = cls.from_dict(content["report"])
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{source} is no curvature report, or a damaged one: {error}") from error
        found.eigenvectors.update(content["eigenvectors"])
        return found


_SEAL = "sha256"


def _digest(content: dict[str, Any]) -> str:
    """Hash of the content, however its text is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class PlanRow:
    """A section of a plan.

    Attributes:
        part: Section and matrix.
        amount: Its share, in units of the budget.
        wanted: Its cost without a limit.
        cut: Whether the budget ends before it.
    """

    part: str
    amount: float
    wanted: float
    cut: bool


@dataclass(frozen=True)
class Plan:
    """Predicted cost of a report.

    Attributes:
        unit: "seconds" or "products".
        budget: The limit; infinite without one.
        spent: Cost of the measurement.
        rows: The sections, the most worthwhile first.
        refused: Parts that cannot be computed.
    """

    unit: str
    budget: float
    spent: float
    rows: tuple[PlanRow, ...]
    refused: tuple[Refusal, ...]

    @property
    def total(self) -> float:
        """Predicted cost of the whole report, measurement included."""
        return self.spent + sum(row.amount for row in self.rows)

    def __str__(self) -> str:
        """A table."""
        width = max(len(row.part) for row in self.rows) if self.rows else 0
        limit = "no limit" if self.budget == inf else f"budget {self.budget:g}"
        lines = [f"Predicted cost in {self.unit} ({limit}); {self.spent:.3g} spent on the measurement"]
        for row in self.rows:
            amount = "cut" if row.cut else f"{row.amount:.3g}"
            less = f"   of {row.wanted:.3g} wanted" if row.cut or row.amount < 0.99 * row.wanted else ""
            lines.append(f"  {row.part:<{width}}  {amount:>8}{less}".rstrip())
        lines.append(f"  {'total':<{width}}  {self.total:>8.3g}")
        lines += [f"Refused: {refusal.part}: {refusal.message}" for refusal in self.refused]
        return "\n".join(lines)
