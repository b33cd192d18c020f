"""The documentation runs: the Python blocks of each page, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("solvers", "curvature", "precond")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# ```python runs; ```python no-run does not.
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


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
    monkeypatch.chdir(tmp_path)  # a page may write files
    code = compile(script(path.read_text(encoding="utf-8")), str(path), "exec")
    exec(code, {"__name__": "__main__"})


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


def test_an_example_with_a_wrong_result_is_reported() -> None:
    report: list[str] = []
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    results = doctest.DocTestRunner().run(example, out=report.append)
    assert results.failed == 1
    assert "Expected:\n    3\nGot:\n    2" in "".join(report)
