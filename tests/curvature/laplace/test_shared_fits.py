"""Is a posterior of data that are shared out over processes that of one process that has them all?"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.curvature.laplace import shared_fits as runs
from tests.distributed_run import ranks

#: What each case is told, on the rank where it went wrong and on the other.
TOLD = {
    "extended": ("ValueError: override=False extends the posterior of one process",) * 2,
    "online": ("TypeError: an online posterior is extended task by task, in one process",) * 2,
    "functional": ("NotImplementedError: ELLA keeps features .* is fitted in one process",) * 2,
    "no data": ("ShareFailed: .* rank 1 failed.*no batches in this process", "ValueError: train_loader has no batches"),
    "broken": ("ShareFailed: .* rank 1 failed.*nan", "NonFiniteLossError: The loss is nan"),
}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks(runs.on_two, 2, timeout=300.0)


pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]


def test_fits_over_two_processes_are_those_of_one(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["gaps"]) == 2 * len(runs.POSTERIORS)
        assert {name: gap for name, gap in rank["gaps"].items() if not gap < 1e-10} == {}


def test_matrix_free_posteriors_too_one_of_whom_may_have_no_data(found: list[dict[str, Any]]) -> None:
    assert found[0]["free"] == found[1]["free"]
    for result in found[0]["free"]:
        assert result["evidence"] < 1e-10
        assert abs(result["trace of draws"] - 1) < 0.1  # 0.5 if one process drew alone, 2 if both drew the same


def test_what_no_process_can_do_alone_is_refused_on_both(found: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(found):
        told = rank["refusals"]
        assert {name: told[name] for name, words in TOLD.items() if not re.search(words[number], told[name])} == {}
