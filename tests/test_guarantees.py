"""The page of guarantees names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def missing(page: str) -> list[str]:
    """Tests that a page names and the suite has not."""
    found = []
    for file, name in NAMED.findall(page):
        path = ROOT / file
        functions = (
            {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_test(node)}
            if path.exists()
            else set()
        )
        if name not in functions:
            found.append(f"{file}::{name}")
    return found


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def promises(page: str) -> list[tuple[str, str]]:
    """Promise and what holds it, row by row."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    return [
        (row[0].strip(), row[1].strip()) for row in rows if len(row) == 2 and row[0].strip() not in ("promise", "---")
    ]


def test_every_promise_names_a_test_that_exists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert missing(page) == []
    rows = promises(page)
    assert len(rows) > 20 and [promise for promise, holder in rows if not NAMED.search(holder)] == []


def test_a_test_that_is_gone_is_found() -> None:
    here = "tests/test_guarantees.py"
    page = f"`{here}::test_gone` `{here}::missing` `tests/gone.py::test_a` `{here}::test_a_test_that_is_gone_is_found`"
    assert missing(page) == [f"{here}::test_gone", f"{here}::missing", "tests/gone.py::test_a"]
    assert promises("| promise | held by |\n| --- | --- |\n| A. | nothing |") == [("A.", "nothing")]
