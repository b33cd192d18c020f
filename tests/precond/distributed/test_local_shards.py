"""With ``shards="local"``: does each process take its rows for parameters of their own, as one with such blocks?"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.distributed_run import ranks
from tests.precond.distributed import local_runs as runs

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

#: What each case is told.
TOLD = {
    "one process": r"state of .*\(3, 1, 2\) was cut along axis 0 into 2, 1, and is now whole.*on as many processes",
    "whole": r"was whole, and is now cut along axis 0 into 2, 1",
    "four": r"was cut along axis 0 into 1, 1, 1, 0, and is now cut along axis 0 into 2, 1",
    "lossless": r"saved with shards='local', and the optimizer has shards='lossless'.*Make the optimizer with",
    "word": "shards is one of lossless, local, not 'rows'",
    "hessian": "PSGD does not take sharded parameters as it is used here, so shards='local' has no effect",
    "AdaHessian": "AdaHessian does not take sharded parameters as it is used here",
    "Sophia": "Sophia does not take sharded parameters as it is used here",
    "unmoved": r"saved with shards='lossless', and the optimizer has shards='local'",
    "layers": r"KFAC has no option 'shards', which is of methods that keep matrices of the gradients",
    "window": r"MFAC has no option 'shards'.*those of this method belong to whole parameters",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks and then two have found; checkpoints of the four are loaded by the two."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    four = ranks(runs.on_four, 4, folder, timeout=300.0)
    return {"four": four, "two": ranks(runs.on_two, 2, folder, timeout=300.0)}


def test_rows_are_parameters_of_their_own(found: dict[str, Any]) -> None:
    for rank in found["four"]:
        assert far(rank["one axis"]) == far(rank["hybrid"]) == {} and rank["replicas"]
    for rank in found["two"]:
        assert rank["differences"].keys() == runs.MAKES.keys()
        assert far(rank["differences"]) == {} and max(rank["tensor parallel"].values()) <= 1e-10
        # Norms that are controlled are those of whole matrices.
        assert rank["norms"][0] < 1e-12 and rank["norms"][1] > 1e-3
        assert {name: pair for name, pair in rank["traffic"].items() if pair[0] != pair[1]} == {}
        assert {name: gap for name, gap in rank["loads"].items() if gap > 1e-14} == {}
        told = rank["refusals"]
        assert told.keys() == TOLD.keys()
        assert {name: told[name] for name, words in TOLD.items() if not re.search(words, told[name])} == {}


def test_meshes_of_different_ranks_have_an_optimizer_each(found: dict[str, Any]) -> None:
    for number, rank in enumerate(found["four"]):
        pair = "0, 1" if number < 2 else "2, 3"
        told, left = rank["meshes"][:2], rank["meshes"][2:]
        assert all(re.search(f"different ranks, .*{pair}.*an optimizer of their own", words) for words in told), told
        assert left == ["1", "True"]  # the group was not added; and both have moved


def test_all_ranks_decide_together(found: dict[str, Any]) -> None:
    for number, rank in enumerate(found["two"]):
        of = rank["disagreements"]
        assert of["skipped"] == (1, 0.0, 1)
        assert of["failure"].startswith(
            "SolverError: the factors" if number == 1 else "OtherRankFailed: the step failed on rank 1"
        )
        assert of["moved"] == of["afterwards"] == 0


def far(gaps: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Methods whose run is not that of one process, on the same data or on shares of it.

    Not to the bit: one process has the blocks of all ranks in one stack, and there are processors on which a batched
    product rounds otherwise in a longer stack (1e-17 to 1e-14 in the tables, 2e-12 after SOAP has divided by them).
    """
    return {name: gap for name, gap in gaps.items() if not max(gap) <= 1e-10}
