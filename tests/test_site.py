"""The documentation as a site: every page has its place, every link leads somewhere, every public name is described."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
PACKAGES = ("precond", "curvature", "solvers")

spec = importlib.util.spec_from_file_location("docs_site_hooks", SITE / "hooks.py")
assert spec is not None and spec.loader is not None
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

PAGES = {str(path.relative_to(ROOT / "docs")): path for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES |= {page: ROOT / path for path, page in site.PROJECT.items()}
NOTEBOOKS = site.notebook_pages()


def text_of(page: str) -> str:
    """The Markdown of a page, as it is in the repository."""
    return NOTEBOOKS[page] if page in NOTEBOOKS else PAGES[page].read_text(encoding="utf-8")


def settings() -> dict[str, Any]:
    """The settings of MkDocs, whose file names a Python function."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    return yaml.load((SITE / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def leaves(navigation: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(navigation, str):
        return [navigation]
    entries = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for entry in entries for page in leaves(entry)]


def test_the_navigation_lists_every_page_once() -> None:
    listed = leaves(settings()["nav"])
    project = {page for path, page in site.PROJECT.items() if path in site.TITLES}  # added by the hooks
    assert sorted(listed) == sorted({*PAGES, *NOTEBOOKS} - project)
    assert sorted(leaves(site.api_navigation())) == sorted(site.api_pages())


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_every_link_leads_to_a_page_or_a_file_of_the_site(page: str) -> None:
    text = text_of(page)
    moved = site.with_links_of_the_site(text, page)
    lost = []
    for link in (match[2] for part in site.FENCE.split(moved)[::2] for match in site.LINK.finditer(part)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.partition("#")[0]))
        source = ROOT / target.removeprefix("source/").removesuffix(".md")
        known = target in PAGES or target in NOTEBOOKS or (ROOT / "docs" / target).is_file()
        there = known or (target.startswith("source/") and source.is_file())
        if "://" not in link and link.partition("#")[0] and not there:
            lost.append(link)
    assert lost == []
    prose = "".join(site.FENCE.split(text)[::2])
    assert page == "project/licence.md" or len(re.findall(r"^# ", prose, re.MULTILINE)) == 1, "one title for each page"


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = "[a](b.md#c) [m](../../solvers/rules.py) [r](../../README.md) [w](https://d.e) [h](#h)\n```\n[x](y)\n```"
    assert site.with_links_of_the_site(text, "concepts/page.md") == (
        "[a](b.md#c) [m](../source/solvers/rules.py.md) [r](../index.md) [w](https://d.e) [h](#h)\n```\n[x](y)\n```"
    )
    assert site.with_links_of_the_site("[s](docs/start.md) [c](CHANGELOG.md)", "index.md") == (
        "[s](start.md) [c](project/changelog.md)"
    )
    assert site.targets(text, "concepts/page.md") == ["docs/concepts/b.md", "solvers/rules.py", "README.md"]


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[s](../start.md)"]},
        {
            "cell_type": "code",
            "source": ["print(1)\n", 'ax.set(title="a < b")'],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["1\n", "```\n"]},
                {"output_type": "display_data", "data": {"image/png": "iVBO\n"}},
                {"output_type": "execute_result", "data": {"text/plain": ["'x'"]}},
            ],
        },
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert site.notebook_page(tmp_path / "n.ipynb") == (
        '# Title\n[s](../start.md)\n\n```python\nprint(1)\nax.set(title="a < b")\n```\n\n````text\n1\n```\n````\n\n'
        '<img class="drawn" alt="Picture: a &lt; b" src="data:image/png;base64,iVBO">\n\n'
        "````text\n'x'\n````\n\n<a href=\"n.ipynb\">The notebook</a> itself, to run it.\n"
    )


def test_a_bar_in_code_in_a_table_has_no_backslash() -> None:
    page = "| a | `x \\| y` \\| z |\n`x \\| y`"
    assert site.with_bars_in_code(page) == "| a | `x | y` \\| z |\n`x \\| y`"


def test_a_mark_behind_a_fence_is_left_out() -> None:
    page = "```python no-run\nx = 1\n```\n[c](../CHANGELOG.md)\n```python\ny\n```\n"
    shown = "```python\nx = 1\n```\n[c](project/changelog.md)\n```python\ny\n```\n"
    assert site.as_page_of_the_site(page, "start.md") == shown
    assert {line for path in PAGES.values() for line in path.read_text().splitlines() if line.startswith("```")} <= {
        *("```", "```python", "```python no-run", "```sh", "```text"),
    }


def test_the_reference_has_every_public_name_in_one_place() -> None:
    described = re.findall(r"^::: (\S+)$", "\n".join(site.api_pages().values()), re.MULTILINE)
    assert len(set(described)) == len(described)
    for package in PACKAGES:
        public = importlib.import_module(package).__all__
        assert list(site.exports(package)) == public
        index = site.api_pages()[f"api/{package}/index.md"]
        referred = {name: home for name, home in re.findall(r"\[`(\w+)`\]\[([\w.]+)\]", index)}
        assert sorted(referred) == sorted(public)
        assert [name for name, home in referred.items() if home not in described] == []


DOCSTRING = r"""The share :math:`s_t` of :class:`KFAC` and :meth:`~precond.KFAC.step`, of ``x``, of :func:`unknown`.

.. math:: s = \sum_t s_t,
    \qquad t > 0

====================== =========
Paper, equation 1      here
====================== =========
:math:`s`              ``share``
                       and more
====================== =========

=====  =====
``a``  first
=====  =====

>>> 1 + 1
2
"""


def test_a_docstring_becomes_markdown() -> None:
    assert site.as_markdown(DOCSTRING, {"KFAC": "precond"}).replace("\n\n\n", "\n\n") == (
        "The share $s_t$ of [`KFAC`][precond.KFAC] and [`step`][precond.KFAC], of ``x``, of `unknown`.\n\n"
        "$$\ns = \\sum_t s_t,\n\\qquad t > 0\n$$\n\n"
        "| Paper, equation 1 | here |\n| --- | --- |\n| $s$ | ``share`` and more |\n\n"
        "|  |  |\n| --- | --- |\n| ``a`` | first |\n\n"
        "```pycon\n>>> 1 + 1\n2\n```\n"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_docstring_keeps_markup_that_the_site_would_show_as_it_is(package: str) -> None:
    homes = site.homes()
    left = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                shown = re.sub("``.*?``", "", site.as_markdown(text, homes), flags=re.DOTALL)
                left += [
                    (path.name, found) for found in re.findall(r":\w+:`|\.\. \w+::|^ *=== *.*$", shown, re.MULTILINE)
                ]
    assert left == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_other_host(tmp_path: Path) -> None:
    for tool in ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml"):
        pytest.importorskip(tool)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE / "mkdocs.yml"), "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert outcome.returncode == 0, outcome.stderr
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]* src="https?://|<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*https?://'
    )
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) + len(NOTEBOOKS)
    assert [str(page) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
