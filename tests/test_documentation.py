"""The documentation runs: the Python blocks of each page, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("solvers", "curvature", "precond")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md"]

# ```python runs; ```python no-run does not.
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)

# A page about a library that need not be there.
NEEDS = re.compile(r"^<!-- needs: (\w+) -->$", re.MULTILINE)

LINK = re.compile(r"\]\(([^)\s]*)\)")
# `curvature/matrices/ggn.py`, but no `curvature/structures/<structure>.py` and no glob.
FILE = re.compile(r"`((?:curvature|docs|precond|solvers|tests)/[\w./-]*(?:/|\.\w+))`")
# `curvature.ggn`, also at the beginning of a call.
NAME = re.compile(r"`((?:curvature|precond|solvers)(?!\.pt`)(?:\.\w+)+)(?=[`(\[])")


def script(page: str) -> str:
    """The Python blocks of a page as one script, each line where the page has it."""
    lines = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


PAGES_WITH_CODE = [path for path in PAGES if script(path.read_text(encoding="utf-8")).strip()]
MODULES_WITH_EXAMPLES = [
    path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", PAGES_WITH_CODE, ids=names(PAGES_WITH_CODE))
def test_code_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = path.read_text(encoding="utf-8")
    for library in (libraries := NEEDS.findall(page)):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)  # a page may write files
    code = compile(script(page), str(path), "exec")
    with warnings.catch_warnings():
        if libraries:  # which warn of themselves
            warnings.simplefilter("ignore")
        exec(code, {"__name__": "__main__"})


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    shown = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in shown}


def broken_links(path: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    broken = []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        if "://" in link or link.startswith("mailto:"):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("path", PAGES_WITH_LINKS, ids=names(PAGES_WITH_LINKS))
def test_a_page_names_only_what_exists(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert broken_links(path) == []
    assert [file for file in FILE.findall(page) if not (ROOT / file).exists()] == []
    assert [name for name in NAME.findall(page) if not exists(name)] == []


def test_what_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `noisy` [sinusoid](a.py), drawn\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](https://d.e/f) [b](other.md#a-noisy-sinusoid-drawn) [g](gone.md) [h](other.md#no)")
    assert broken_links(page) == ["gone.md", "other.md#no"]
    assert FILE.findall("`curvature/gone.py` `curvature/<layer>.py`") == ["curvature/gone.py"]
    assert NAME.findall("`curvature.ggn(model)` `solvers.CG`, not curvature.x") == ["curvature.ggn", "solvers.CG"]
    assert exists("curvature.ggn") and exists("solvers.rules.power")
    assert not exists("curvature.gone") and not exists("solvers.CG.gone")


@pytest.mark.parametrize("path", MODULES_WITH_EXAMPLES, ids=names(MODULES_WITH_EXAMPLES))
def test_examples_in_docstrings_hold(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(module):
        runner.run(example, out=report.append)
    assert runner.tries > 0, "the examples are not in docstrings that doctest finds"
    assert runner.failures == 0, "".join(report)


def test_a_page_becomes_one_script_that_keeps_its_lines() -> None:
    page = "# A\n```python\nx = 1\n```\n```python no-run\nx = 2\n```\n```\nx = 3\n```\n```python\nassert x == 1\n```"
    assert script(page).splitlines() == ["", "", "x = 1", *[""] * 8, "assert x == 1"]


# What a page teaches to add is one file: each block that defines something is whole, and short.
TOYS = ("new-layer", "new-loss", "new-structure", "new-operator", "new-solver", "new-optimizer")


def toys(page: str) -> list[str]:
    """The blocks of a page that define a class or a function."""
    return [block[1] for block in BLOCK.finditer(page) if re.search(r"^(@|class |def )", block[1], re.MULTILINE)]


@pytest.mark.parametrize("page", TOYS)
def test_a_toy_takes_at_most_forty_lines(page: str) -> None:
    path = ROOT / "docs" / "how-to" / f"{page}.md"
    found = toys(path.read_text(encoding="utf-8"))
    assert path in PAGES_WITH_CODE and found
    assert [len(toy.splitlines()) for toy in found if len(toy.splitlines()) > 40] == []


def test_toys_are_the_blocks_that_define_something() -> None:
    page = "```python\nx = 1\n```\n```python\nimport torch\n\n\n@torch.no_grad()\ndef f(): ...\n```\n"
    assert toys(page) == ["import torch\n\n\n@torch.no_grad()\ndef f(): ...\n"]


def test_an_example_with_a_wrong_result_is_reported() -> None:
    report: list[str] = []
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    results = doctest.DocTestRunner().run(example, out=report.append)
    assert results.failed == 1
    assert "Expected:\n    3\nGot:\n    2" in "".join(report)
