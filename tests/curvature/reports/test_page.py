"""Can the page be read, on a phone and on a wide screen, by day and by night, without a network?"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvature.reports import Report, report
from tests.curvature.problems import normal

pytest.importorskip("matplotlib")

from curvature.reports.pages.figures import _CYCLE, _INK, _densities, _eigenvalues, _fitting, page_style


@functools.cache
def made() -> Report:
    """A report with everything on it: long names, many layers, errors, refusals, cuts and notes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential()
        for i in range(14):
            block = nn.Sequential()
            block.add_module("self_attention_output_projection<&>", nn.Linear(5, 5))
            model.add_module(f"transformer_layer_{i}", block)
            model.append(nn.Tanh())
        model.append(nn.Linear(5, 3)).double()
    target = torch.arange(24) % 3

    def draw(name: str) -> Any:
        return report(model, nn.CrossEntropyLoss(), (normal(24, 5), target), products=700, exact=False, k=4)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        found: Report = draw("all")
    return found


@functools.cache
def html() -> str:
    return made().to_html()


class Page(HTMLParser):
    """Elements that are opened, and whether all are closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag
        self.open.pop()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


def test_the_page_needs_nothing_else() -> None:
    text = html()
    found = Page(text)
    assert found.all("script") == [] and found.all("img") == [] and found.all("iframe") == []
    links = [attrs["href"] for tag in ("a", "link", "use") for attrs in found.all(tag) if attrs.get("href")]
    assert all(link is not None and (link.startswith("#") or link == "data:,") for link in links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(text) < 1_000_000


def test_names_are_escaped_and_identifiers_are_unique() -> None:
    text = made().to_html()
    assert "projection&lt;&amp;&gt;" in text and "projection<&>" not in text
    found = Page(text)
    ids = [attrs["id"] for _, attrs in found.seen if attrs.get("id")]
    assert len(set(ids)) == len(ids)
    targets = [attrs["href"][1:] for tag in ("a", "use") for attrs in found.all(tag) if attrs["href"]]
    assert set(targets) <= set(ids) and set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_tables_and_plots_speak() -> None:
    found = Page(html())
    assert len(found.all("table")) == len(found.all("caption")) >= 9
    assert all(attrs.get("scope") in ("row", "col") for attrs in found.all("th"))
    plots = [attrs for attrs in found.all("svg") if "aria-label" in attrs]
    assert len(plots) == 8 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    assert len(found.all("figcaption")) == len(found.all("figure")) == 5
    assert found.all("html")[0]["lang"] == "en"


def test_plots_take_the_colours_of_the_page() -> None:
    text = html()
    assert not any(colour in text for colour in (_INK, *_CYCLE))
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert {"var(--ink)", "var(--c0)", "var(--c1)", "var(--c2)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []  # no colour that a theme could not change


def test_adjacent_pictures_have_the_same_scales() -> None:
    found = made()

    def limits(draw: Any) -> tuple[float, ...]:
        from matplotlib.figure import Figure

        with page_style(""):
            ax = Figure().subplots()
            draw(ax)
        return (*ax.get_xlim(), *ax.get_ylim())

    for drawings in (_densities, _eigenvalues):
        hessian, ggn = (limits(draw) for _, _, _, draw in drawings(found))
        assert hessian == ggn
    values = [pair.value for result in found.eigenvalues.values() for pair in result.largest]
    assert hessian[2] < min(values) and max(values) < hessian[3]


def test_names_of_layers_fit_beside_a_plot() -> None:
    assert _fitting("layers.3") == "layers.3"
    assert _fitting("transformer.h.11.attn.c_attn") == "t.h.11.attn.c_attn"
    assert _fitting("bert.encoder.layer.10.attention.self.query") == "b.e.l.10.a.self.query"
    assert len(_fitting("a_name_of_one_part_that_is_very_long")) == 22


def test_style_of_the_user_has_no_say_and_stays() -> None:
    import matplotlib

    expected = html()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert made().to_html() == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    text = made().to_html()
    assert "precond[plot]" in text and "<svg" not in text
    Page(text)


def test_the_terminal_is_a_hundred_columns_wide() -> None:
    lines = str(made()).splitlines()
    assert max(map(len, lines)) <= 100
    assert "... and 3 more" in lines  # of fifteen layers


def test_a_report_without_sections_is_a_page() -> None:
    found = report(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(3, 2), torch.zeros(3, 1)), sections=["loss"])
    Page(found.to_html())
    assert "gradient norm" in str(found)


# In a browser ---------------------------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=options)
        yield started
        started.close()


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(browser: Any, theme: str, width: int, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html(), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(sizes) == 8 and all(box["width"] > 250 and box["height"] > 80 for box in sizes)
    assert all(0 <= box["left"] and box["right"] <= width for box in sizes)
    paper, ink, axis, letters = page.evaluate(
        """() => {
            const of = (element, name) => getComputedStyle(element)[name];
            const text = document.querySelector('figure svg text');
            const line = document.querySelector('figure svg [id*="line2d"] path');
            return [of(document.body, 'backgroundColor'), of(document.body, 'color'), of(text, 'fill'),
                    parseFloat(of(text, 'fontSize')) * text.getScreenCTM().a];
        }"""
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (paper, ink, axis)]
    assert (light[0] > 0.9 and max(light[1:]) < 0.3) if theme == "light" else (light[0] < 0.2 and min(light[1:]) > 0.7)
    assert letters >= 8.5  # pixels
    page.close()
