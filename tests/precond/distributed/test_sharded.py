"""Do methods that need gradients alone take the steps of one process where parameters are sharded, or refuse?"""

from __future__ import annotations

import re
from typing import Any

import pytest

from precond.demo.command import one_thread
from tests.distributed_run import ranks
from tests.precond.distributed import sharded_runs as runs

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # the last load is in a single process
]

#: Sums over shards enter: the Gram matrix of a window, the bound of a step, norms that are controlled.
# Muon's polynomials of X X^T multiply the rounding of small singular values by the square of what they grow by, 1e5.
SUMS_OVER_SHARDS = {"MFAC": 1e-14, "Muon": 1e-11, "Muon controlled": 1e-11}


def far(gaps: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Methods whose run is not that of one process: to the bit on the same data, to rounding on shares of them."""
    return {
        name: gap for name, gap in gaps.items() if not (gap[0] <= SUMS_OVER_SHARDS.get(name, 0.0) and gap[1] <= 1e-10)
    }


#: What each case is told.
TOLD = {
    "closure": "Newton does not take parameters that are shared out",
    "hessian": "PSGD does not take parameters that are shared out",
    "twice": r"shape \(2, 1\) as \(Shard\(dim=0\), Shard\(dim=1\)\).*cut along one axis of the mesh",
    "flat": "SOAP does not take parameters of FullyShardedDataParallel.*fully_shard",
    "SOAP before": "SOAP was made before the model was sharded: 6 of its parameters.*Call fully_shard first",
    "Muon before": "Muon was made before the model was sharded: 6 of its parameters",
    "KFAC before": "KFAC was made before the model was sharded: 6 of its parameters",
    "part before": "SOAP was made before the model was sharded: 2 of its parameters",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks and then two have found; checkpoints of the four are loaded by the two, and by this process."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    four = ranks(runs.on_four, 4, folder, timeout=400.0)
    two = ranks(runs.on_two, 2, folder, timeout=400.0)
    with one_thread():  # as each rank has: threads share out the terms of a sum
        return {"four": four, "two": two, "one": runs.loads((), folder)}


def test_steps_checkpoints_refusals_and_traffic(found: dict[str, Any]) -> None:
    steps_are_those_of_one_process(found)
    checkpoints_move_between_meshes(found)
    what_is_not_served_is_refused_by_name(found)
    all_ranks_decide_together(found)
    traffic_and_memory_are_those_of_the_plan(found)
    buckets_are_computed_while_others_are_on_their_way(found["two"])
    meshes_of_the_same_ranks_are_one(found["two"])


def steps_are_those_of_one_process(found: dict[str, Any]) -> None:
    assert found["four"][0]["hybrid"].keys() == found["two"][0]["differences"].keys() == runs.METHODS.keys()
    for rank in found["four"]:
        assert far(rank["hybrid"]) == far(rank["one axis"]) == {}
    for rank in found["two"]:
        assert far(rank["differences"]) == {}
        assert rank["other_ways"] == {"halves": 0, "averages": 0, "groups": 0}
        assert {name: gap for name, gap in rank["tensor_parallel"].items() if gap > 1e-10} == {}


def checkpoints_move_between_meshes(found: dict[str, Any]) -> None:
    """Saved on 2 x 2, they go on bit for bit on two ranks and on one; and so does a plain ``state_dict``."""
    for loaded in (*(rank["loads"] for rank in found["two"]), found["one"]):
        assert loaded.keys() == set(runs.SAVED)
        assert {name: gap for name, gap in loaded.items() if gap > SUMS_OVER_SHARDS.get(name, 0.0)} == {}
    for rank in found["two"]:
        assert max(rank["plain_states"].values()) <= 1e-14
        assert rank["replicated"] == {"SOAP": (0, 0), "MFAC": (0, 0)}


def what_is_not_served_is_refused_by_name(found: dict[str, Any]) -> None:
    for rank in found["two"]:
        assert rank["refusals"].keys() == TOLD.keys()
        assert [name for name, words in TOLD.items() if not re.search(words, rank["refusals"][name])] == []


def all_ranks_decide_together(found: dict[str, Any]) -> None:
    for number, rank in enumerate(found["two"]):
        of = rank["disagreements"]
        # Skipped once, nothing moved, one warning: also on the rank whose gradients were finite.
        assert of["SOAP"] == of["Muon"] == of["MFAC"] == (1, True, 1)
        assert of["failure"].startswith(
            "SolverError: the factors" if number == 1 else "OtherRankFailed: the step failed on rank 1"
        )
        assert of["steps"] == 2 and of["afterwards"] == 0  # the same batch could be tried again


def traffic_and_memory_are_those_of_the_plan(found: dict[str, Any]) -> None:
    """There and back again, to the byte; and all ranks together keep what one process would keep."""
    for rank in found["two"]:
        for of in rank["traffic"].values():
            assert of["messages"] == 2 and of["measured"] == of["planned"]
            assert of["all planned"] == of["alone"]


def buckets_are_computed_while_others_are_on_their_way(two: list[dict[str, Any]]) -> None:
    """With the bits that one bucket gives."""
    for rank in two:
        for gap, events in rank["buckets"].values():
            assert gap == 0
            kinds = [kind for kind, _ in events]
            count = kinds.count("compute")
            assert count > 2
            assert kinds == ["begin"] * count + ["wait", "compute", "begin"] * count + ["wait"] * count
            # All gradients set out; each is waited for, computed, and sent back; all directions are waited for.
            started, waited = ([which for kind, which in events if kind == name] for name in ("begin", "wait"))
            assert started == waited and len(set(started)) == 2 * count


def meshes_of_the_same_ranks_are_one(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["alike_meshes"].keys() == {"SOAP bounded", "Muon", "Muon controlled", "KFAC", "step norm"}
        assert {name: gap for name, gap in rank["alike_meshes"].items() if gap > 1e-10} == {}
