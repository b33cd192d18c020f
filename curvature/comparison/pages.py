"""A comparison chapter by chapter, as text and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING

import torch

from curvature import plots
from curvature.comparison.quantities import Difference, Measured, Quantity
from curvature.plots.spectrum import lowest_shown
from curvature.plots.style import ERRORS, colour, legend, prepare
from curvature.reports.pages.chapter import ERROR, STAR, Chapter, Table, notes
from curvature.reports.pages.figures import Drawing, Plot, as_density, drawn, with_common_limits
from curvature.reports.pages.formats import DASH, plain, with_error
from curvature.reports.pages.page import document
from curvature.reports.pages.text import plain_text
from curvature.reports.pages.view import NAMES, named
from curvature.reports.results import EigenvaluesResult, Findings
from solvers import Eigenpairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 18  # letters of a report's name in the head of a column
_MOST = 4  # curves over each other
_BOUND = "± of eigenvalues, their share of the gradient and condition: a bound, within which a true value lies."
_HOW = (
    "± behind a difference: the root of the sum of both squared standard errors, or the sum of both bounds.",
    "In errors: the difference over that; beyond 2 (beyond 1 for bounds) the numbers differ.",
)


def text(
    names: Sequence[str],
    reports: Sequence[Findings],
    obstacles: Sequence[str],
    remarks: Sequence[str],
    quantities: Sequence[Quantity],
) -> str:
    """Tables, 100 columns wide."""
    shown = _short(names)
    return plain_text(_title(names), _facts(shown, reports), _chapters(shown, reports, obstacles, remarks, quantities))


def page(
    names: Sequence[str],
    reports: Sequence[Findings],
    obstacles: Sequence[str],
    remarks: Sequence[str],
    quantities: Sequence[Quantity],
) -> str:
    """One page of HTML."""
    shown = _short(names)

    def draw(which: str) -> list[Plot]:
        return drawn(which, _drawings(which, shown, reports))

    return document(
        _title(names),
        "Curvature reports compared",
        f"{escape(names[-1])} <span>against {escape(names[0])}</span>",
        _facts(shown, reports),
        _chapters(shown, reports, obstacles, remarks, quantities),
        draw,
        f"{escape(reports[-1].created)}, by <code>curvature.compare</code> of precond.",
    )


def _title(names: Sequence[str]) -> str:
    return f"Curvature of {names[-1]} against {names[0]}"


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit above a column, all different."""
    found = [name if len(name) <= _LONGEST else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _LONGEST :]}" for name in names]
    return found if len({*found}) == len(found) else [f"{i}: {name[3:]}" for i, name in enumerate(found, start=1)]


def _facts(names: Sequence[str], reports: Sequence[Findings]) -> list[tuple[str, str]]:
    first = reports[0]
    facts = [("reports", f"{len(reports)}"), ("model", first.model), ("loss", first.loss_fn)]
    facts.append(("parameters", f"{first.parameters:,}"))
    setting = first.setting
    if setting is not None:
        facts += [("mode", setting.mode), ("dtype", setting.dtype)]
        facts += [("examples", f"{setting.examples:,}")] if setting.examples is not None else []
    facts.append(("seeds", ", ".join(dict.fromkeys(str(report.seed) for report in reports))))
    return facts


def _chapters(
    names: Sequence[str],
    reports: Sequence[Findings],
    obstacles: Sequence[str],
    remarks: Sequence[str],
    quantities: Sequence[Quantity],
) -> list[Chapter]:
    compared = [q for q in quantities if q.differences[-1] is not None]
    made = [
        _comparable(obstacles, remarks),
        _course(names, reports),
        _numbers(names, compared),
        _spectra(names, compared),
        _layers(names, reports, compared),
    ]
    return [chapter for chapter in made if chapter is not None]


def _comparable(obstacles: Sequence[str], remarks: Sequence[str]) -> Chapter | None:
    if not obstacles and not remarks:
        return None
    found = tuple(f"Not comparable in this: {obstacle}." for obstacle in obstacles)
    return Chapter(
        "What else differs",
        "Numbers can be compared as far as the reports were made in the same way, on the same data, in the same mode.",
        found + tuple(f"{remark[0].upper()}{remark[1:]}." for remark in remarks),
    )


def _course(names: Sequence[str], reports: Sequence[Findings]) -> Chapter | None:
    if len(reports) < 3:
        return None
    head, columns = ["", "loss", "gradient norm"], [names, [plain(r.loss.value) for r in reports]]
    columns.append([plain(r.loss.gradient_norm) for r in reports])
    marked: list[tuple[str, Sequence[str]]] = []
    for matrix, title in NAMES.items():
        tops = [_top(r.eigenvalues.get(matrix)) for r in reports]
        sums = [r.traces.get(matrix) for r in reports]
        traces = [None if s is None else Measured(s.trace.value, s.trace.error) for s in sums]
        for label, values, meaning in (("largest", tops, _BOUND), ("trace", traces, ERROR)):
            if any(value is not None for value in values):
                columns.append([_cell(value) for value in values])
                head.append(f"{title}: {label}")
                marked.append((meaning, columns[-1]))
    rows = tuple(zip(*columns, strict=True))
    return Chapter(
        "Course",
        "The reports in their order: how loss and curvature went on.",
        tables=(Table("Loss and curvature, report by report", tuple(head), rows, notes=notes(*marked)),),
        plots=("course",),
    )


def _top(found: EigenvaluesResult | None) -> Measured | None:
    if found is None or not found.largest:
        return None
    pair = found.largest[0]
    return Measured(pair.value, pair.residual, True, pair.converged and found.complete)


def _numbers(names: Sequence[str], quantities: Sequence[Quantity]) -> Chapter | None:
    chosen = [q for q in quantities if q.layer is None and q.section != "eigenvalues"]
    if not chosen:
        return None
    return Chapter(
        "Numbers",
        f"{names[-1]} against {names[0]}: each number, the difference with its error, and the ratio.",
        _verdict(names, [q for q in quantities if q.layer is None]),
        (_table("Numbers of the whole model", names, chosen),),
    )


def _verdict(names: Sequence[str], quantities: Sequence[Quantity]) -> tuple[str, ...]:
    """How many numbers differ, and which of them the most."""
    last = [(q, q.differences[-1]) for q in quantities]
    found = [(q, d) for q, d in last if d is not None and d.differs is not None]
    different = [q for q, d in found if d.differs]
    open_ones = sum(1 for _, d in last if d is not None and d.differs is None)
    if not found:
        return ()
    said = f"{len(different)} of {len(found)} numbers differ beyond their errors"
    said += f"; {open_ones} more rest on eigenvalues that have not converged." if open_ones else "."
    return (said,)


def _spectra(names: Sequence[str], quantities: Sequence[Quantity]) -> Chapter | None:
    rows = {m: [q for q in quantities if q.section == "eigenvalues" and q.matrix == m] for m in NAMES}
    tables = tuple(_table(f"{NAMES[m]}: ends of the spectrum", names, found) for m, found in rows.items() if found)
    if not tables:
        return None
    return Chapter(
        "Spectrum",
        "The spectra over each other, and eigenvalues by their rank. Eigenvectors may have changed: numbers of one "
        "rank need not belong to one direction.",
        tables=tables,
        plots=("density", "eigenvalues"),
    )


def _layers(names: Sequence[str], reports: Sequence[Findings], quantities: Sequence[Quantity]) -> Chapter | None:
    groups: dict[tuple[str, str | None], list[Quantity]] = {}
    for q in quantities:
        if q.layer is not None:
            groups.setdefault((q.name, q.matrix), []).append(q)
    if not groups:
        return None
    labels = {layer: named(report, layer) for report in reports for layer in report.layers}
    tables = tuple(
        _table(f"{NAMES.get(matrix or '', '')}: {name} by layer", names, found, labels, weights=True)
        for (name, matrix), found in groups.items()
    )
    return Chapter("Layers", "The same, layer by layer: where in the model the curvature changed.", tables=tables)


def _table(
    caption: str,
    names: Sequence[str],
    quantities: Sequence[Quantity],
    labels: dict[str, str] | None = None,
    weights: bool = False,
) -> Table:
    """A row for each quantity: the first and the last report, difference, errors, ratio."""
    rows, sums, bounds = [], list[str](), list[str]()
    for q in quantities:
        first, last, d = q.values[0], q.values[-1], q.differences[-1]
        cells = [_cell(first), _cell(last), _difference(d)]
        (bounds if any(value is not None and value.bound for value in (first, last)) else sums).extend(cells)
        matrix = "" if q.matrix is None or labels is not None or q.section == "eigenvalues" else f" ({NAMES[q.matrix]})"
        label = f"{q.name}{matrix}" if labels is None or q.layer is None else labels[q.layer]
        rows.append((label, *cells, _in_errors(d), _ratio(d)))
    head = ("", names[0], names[-1], "difference", "in errors", "ratio")
    known = notes((ERROR, sums), (_BOUND, bounds))
    how = _HOW if any("±" in row[3] for row in rows) else ()
    marks = (*(note for note in known if note != STAR), *how, *(note for note in known if note == STAR))
    sizes = tuple(max(abs(v.value) for v in q.values if v is not None) for q in quantities)
    return Table(caption, head, tuple(rows), weights=sizes if weights else None, notes=marks)


def _cell(x: Measured | None) -> str:
    if x is None:
        return DASH
    shown = plain(x.value) if x.error == 0 else with_error(x.value, x.error)
    return shown if x.converged else f"{shown} *"


def _difference(d: Difference | None) -> str:
    if d is None:
        return DASH
    if d.error == 0:
        return "0" if d.differs is False else f"{d.value:+.4g}"
    digits = with_error(d.value, d.error)
    return digits if digits.startswith(("-", "(")) else f"+{digits}"


def _in_errors(d: Difference | None) -> str:
    if d is None:
        return DASH
    if d.differs is None:
        return "open *"
    if d.in_errors is None:
        return "exact" if d.differs else "equal"
    return f"{d.in_errors:+.1f}" if abs(d.in_errors) < 1000 else f"{d.in_errors:+.0e}"


def _ratio(d: Difference | None) -> str:
    if d is None or d.ratio is None or d.ratio_error is None:
        return DASH
    return plain(d.ratio, 3) if d.ratio_error == 0 else with_error(d.ratio, d.ratio_error)


# Plots ----------------------------------------------------------------------------------------------------------------


def _drawings(which: str, names: Sequence[str], reports: Sequence[Findings]) -> Iterator[Drawing]:
    if which == "course":
        yield from _courses(names, reports)
        return
    known = {
        m: [i for i, r in enumerate(reports) if m in (r.densities if which == "density" else r.eigenvalues)]
        for m in NAMES
    }
    known = {m: there for m, there in known.items() if len(there) > 1}
    shared = [i for i in range(len(reports)) if all(i in there for there in known.values())]
    floor = min((lowest_shown(as_density(found)) for r in reports for found in r.densities.values()), default=None)
    draws: dict[str, Callable[[Axes], object]] = {}
    for m, there in known.items():
        chosen = shared if len(shared) > 1 else there  # a report has one colour in all pictures
        kept = [chosen[i] for i in _spread(len(chosen))]
        if which == "density":
            curves = {names[i]: as_density(reports[i].densities[m]) for i in kept}
            draws[m] = partial(plots.density, curves, floor=floor)
        else:
            draws[m] = partial(plots.eigenvalues, {names[i]: _pairs(reports[i].eigenvalues[m]) for i in kept})
    what, words = {
        "density": ("spectral densities", "How many directions have which curvature, over each other."),
        "eigenvalues": (
            "largest eigenvalues",
            "The steepest directions by rank, side by side; hollow where not converged.",
        ),
    }[which]
    for m, draw in zip(draws, with_common_limits(list(draws.values())), strict=True):
        yield f"{NAMES[m]}: {what}", words, 3.1, draw


def _spread(count: int) -> list[int]:
    """The first, the last, and as many between them as can be told apart."""
    shown = min(count, _MOST)
    return [round(i * (count - 1) / (shown - 1)) for i in range(shown)]


def _pairs(found: EigenvaluesResult) -> Eigenpairs:
    values, residuals, done = (
        torch.tensor([getattr(pair, name) for pair in found.largest]) for name in ("value", "residual", "converged")
    )
    return Eigenpairs(values, torch.empty(0), residuals, done, found.complete, found.products, {})


def _courses(names: Sequence[str], reports: Sequence[Findings]) -> Iterator[Drawing]:
    losses = {"loss": [Measured(report.loss.value) for report in reports]}
    tops = {title: [_top(report.eigenvalues.get(m)) for report in reports] for m, title in NAMES.items()}
    sums = {title: [report.traces.get(m) for report in reports] for m, title in NAMES.items()}
    traces = {
        title: [None if s is None else Measured(s.trace.value, s.trace.error) for s in row]
        for title, row in sums.items()
    }
    for title, lines in (("Loss", losses), ("Largest eigenvalue", tops), ("Trace", traces)):
        known: dict[str, Sequence[Measured | None]] = {
            name: row for name, row in lines.items() if sum(value is not None for value in row) > 1
        }
        if known:
            words = "Report by report, with bars of two standard errors or of the bound; hollow where not converged."
            yield title, words, 2.6, partial(_lines, names, known)


def _lines(names: Sequence[str], lines: dict[str, Sequence[Measured | None]], ax: Axes) -> None:
    ax = prepare(ax)
    for index, (name, values) in enumerate(lines.items()):
        there = [(i, value) for i, value in enumerate(values) if value is not None]
        at = [i for i, _ in there]
        ax.plot(at, [value.value for _, value in there], color=colour(index), linewidth=1.2)
        for done, fill in ((True, colour(index)), (False, "none")):
            chosen = [(i, value) for i, value in there if value.converged is done]
            if chosen:
                ax.errorbar(
                    [i for i, _ in chosen],
                    [value.value for _, value in chosen],
                    [value.error * (1 if value.bound else ERRORS) for _, value in chosen],
                    fmt="o",
                    markersize=4,
                    markerfacecolor=fill,
                    color=colour(index),
                    elinewidth=1,
                    label=name if done or not any(value.converged for _, value in there) else None,
                )
    step = max(1, -(-len(names) // 6))
    shown = range(0, len(names), step)
    ax.set_xticks(list(shown), [names[i] for i in shown])
    if len(lines) > 1:
        legend(ax)
