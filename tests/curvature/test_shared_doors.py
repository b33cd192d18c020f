"""Does each door of the table in docs/how-to/distributed.md do over processes what the table says?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.curvature import shared_doors as runs
from tests.distributed_run import ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "distributed.md"


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks(runs.on_two, 2, timeout=500.0)


pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_report_is_that_of_one_process_and_the_same_page_everywhere(found: list[dict[str, Any]]) -> None:
    first, second = (rank["reports"] for rank in found)
    assert len(first) == 4
    for name in first:
        gaps, page, numbers = first[name]
        assert gaps == {}, name
        assert (page, numbers) == second[name][1:], name


def test_a_budget_in_seconds_is_spent_by_one_clock(found: list[dict[str, Any]]) -> None:
    first, second = (rank["clocked"] for rank in found)
    assert first == second


def test_one_process_writes_the_page(found: list[dict[str, Any]]) -> None:
    assert [rank["files"]["written"] for rank in found] == [["page.html", "page.json", "page.pt"], []]


def test_a_section_that_fails_on_one_rank_is_refused_on_all(found: list[dict[str, Any]]) -> None:
    first, second = (rank["section_that_fails"] for rank in found)
    assert first == second
    parts = {part: (error, message) for part, error, message in first["refused"]}
    assert parts == {f"density ({m})": ("RuntimeError", "out of something") for m in ("hessian", "ggn")}


def test_solvers_find_of_shared_data_what_they_find_of_all(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["operators"]) == 13
        assert {name: gap for name, gap in rank["operators"].items() if not gap < 1e-9} == {}
        assert {name: gap for name, gap in rank["compressed"].items() if not gap < 1e-9} == {}


def test_other_doors_refuse_a_group_by_name(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank["refusals"]
        assert told["report, resumed"].startswith("ValueError: resume keeps the run of one process")
        assert told["fisher, resumed"].startswith("ValueError: resume keeps the sums of one process")
        assert told["influence, stored"].startswith("ValueError: store keeps the files of one process")
        assert told["resumable_eigsh, of shares"].startswith("ValueError: unused keeps the run of one process")
        assert runs.REFUSED == tuple(name for name in told if "," not in name)
        for name in runs.REFUSED:
            door = "Subspace" if name == "subspace" else name
            assert re.match(f"TypeError: {door} works on the data of one process", told[name]), told[name]


def test_the_page_has_a_row_for_each_door() -> None:
    table = PAGE.read_text().split("## Curvature of data that are shared out")[1]
    for name in (*runs.SERVED, *runs.REFUSED):
        assert f"`{name}`" in table, name
