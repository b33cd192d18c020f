"""Chapters as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from curvature.reports.pages.chapter import Chapter, Table
from curvature.reports.pages.figures import Plot, available, figures
from curvature.reports.pages.style import STYLE
from curvature.reports.pages.view import chapters, facts
from curvature.reports.results import Findings

_LONG = 12  # rows of a long table that are shown at once


def page(report: Findings) -> str:
    """The page of a report."""
    return document(
        f"Curvature of {report.model}",
        "Curvature report",
        f"{escape(report.model)} <span>under {escape(report.loss_fn)}</span>",
        facts(report),
        chapters(report),
        lambda name: figures(report, name),
        f"{escape(report.created)}, by <code>curvature.report</code> of precond.",
    )


def document(
    title: str,
    over: str,
    heading: str,
    given: Sequence[tuple[str, str]],
    parts: Sequence[Chapter],
    draw: Callable[[str], list[Plot]],
    footer: str,
) -> str:
    """A page of chapters.

    Args:
        title: Of the page.
        over: The line above the heading.
        heading: As HTML.
        given: Facts at the top.
        parts: The chapters.
        draw: Makes the plots that chapters name.
        footer: As HTML.
    """
    plots = available()
    listed = "".join(f'<li><a href="#{_anchor(c)}">{escape(c.title)}</a></li>' for c in parts)
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in given)
    missing = "" if plots else '<p class="note">Plots need matplotlib: <code>pip install "precond[plot]"</code>.</p>'
    body = "\n".join(_chapter(chapter, draw if plots else None) for chapter in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="over">{escape(over)}</p>
<h1>{heading}</h1>
<dl class="facts">{facts}</dl>
<nav aria-label="Chapters"><ul>{listed}</ul></nav>
{missing}</header>
<main>
{body}
</main>
<footer><p>{footer}</p></footer>
</body>
</html>
"""


def _anchor(chapter: Chapter) -> str:
    return chapter.title.lower().replace(" ", "-")


def _chapter(chapter: Chapter, draw: Callable[[str], list[Plot]] | None) -> str:
    anchor = _anchor(chapter)
    parts = [f'<section aria-labelledby="{anchor}">', f'<h2 id="{anchor}">{escape(chapter.title)}</h2>']
    parts.append(f'<p class="plain">{escape(chapter.plain)}</p>')
    if chapter.findings:
        parts.append('<ul class="findings">' + "".join(f"<li>{escape(f)}</li>" for f in chapter.findings) + "</ul>")
    if draw is not None:
        parts += [_figure(drawn) for name in chapter.plots if (drawn := draw(name))]
    tables = "".join(_table(table) for table in chapter.tables)
    parts.append(f'<div class="tables">{tables}</div>' if len(chapter.tables) > 1 else tables)
    if chapter.expert:
        lines = "".join(f"<p>{escape(line)}</p>" for line in chapter.expert)
        parts.append(f"<details><summary>For experts</summary>{lines}</details>")
    return "\n".join([*parts, "</section>"])


def _figure(plots: list[Plot]) -> str:
    """Plots of one kind side by side, with their common description."""
    drawn = "".join(f"<div><h3>{escape(plot.title)}</h3>{plot.svg}</div>" for plot in plots)
    return f'<figure><div class="pair">{drawn}</div><figcaption>{escape(plots[0].plain)}</figcaption></figure>'


def _table(table: Table) -> str:
    """The table; a long one folded away, since the plots show what is largest in it."""
    shown = _rows(table)
    if table.weights is None or len(table.rows) <= _LONG:
        return shown
    return f"<details><summary>{escape(table.caption)}: {len(table.rows)} rows</summary>{shown}</details>"


def _rows(table: Table) -> str:
    kind = ["" if i < table.words else ' class="n"' for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{k}>{escape(c)}</th>' for c, k in zip(table.head, kind, strict=True))
    rows = []
    for row in table.rows:
        cells = [f"<td{k}>{_cell(c) if k else escape(c)}</td>" for c, k in zip(row, kind, strict=True)]
        if table.words:
            cells[0] = f'<th scope="row">{escape(row[0])}</th>'
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = escape(table.caption)
    marks = f'<p class="marks">{"<br>".join(map(escape, table.notes))}</p>' if table.notes else ""
    return (
        f'<div class="table" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{marks}</div>"
    )


def _cell(text: str) -> str:
    """A number, with a minus sign in the place of the hyphen."""
    return escape(text).replace("-", "\N{MINUS SIGN}")
