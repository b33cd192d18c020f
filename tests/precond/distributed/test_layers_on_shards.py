"""Do layer-based methods take the steps of one process on a model under ``fully_shard``, or refuse?"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from precond.distributed.assignment import assigned
from tests.distributed_run import ranks
from tests.precond.distributed import layered_runs as runs
from tests.precond.distributed.checks import Net, alone, distance, make, parameters, same, train, vectors

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # the last load is in a single process
]

#: What each case is told.
TOLD = {
    "kbfgs": "KBFGS: not served on a model under fully_shard: second passes on the same batch.*DistributedDataParallel",
    "natural dense": "NaturalGradient: not served on a model under fully_shard: one matrix for all parameters",
    "group": "KFAC: not served on a model under fully_shard: process_group=",
    "fraction": "KFAC: not served on a model under fully_shard: memory_fraction=",
    "shadow": r"KFAC: not served on a model under fully_shard: Loop\(capture='shadow'\)",
    "rows": "SMWNaturalGradient does not run in several processes: it keeps the rows of its own batch.*KFAC, EKFAC",
    "sketch": "SENG does not run in several processes: it keeps the rows of its own batch.*KFAC, EKFAC",
    "part": "KFAC: 5 of 7 parameters, the first scale, are in no layer under fully_shard",
    "factor": r"KFAC: set_gradient_divide_factor\(1.0\) makes gradients another mean",
    "reentrant": "KFAC does not run in several processes: this step needs a second forward pass.*use_reentrant=False",
    "tensor parallel": "KFAC does not take parameters that are shared out over processes",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks and then four have found; checkpoints of the two are loaded by the four, and by this process."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    two = ranks(runs.on_two, 2, folder, runs.of_one_process(), timeout=500.0)
    four = ranks(runs.on_four, 4, folder, timeout=400.0)
    return {"two": two, "four": four, "one": runs.loads((), folder)}


def everywhere(ranks: list[dict[str, Any]], part: str) -> dict[str, list[Tensor]]:
    """What all ranks have found, equal bit for bit."""
    first: dict[str, list[Tensor]] = ranks[0][part]
    for name, values in first.items():
        assert all(same(values, other[part][name]) for other in ranks), f"{name} differs between ranks"
    return first


def uninterrupted(name: str) -> list[Tensor]:
    return alone(name, Net(), vectors(5), **runs.OPTIONS)


def test_steps_checkpoints_refusals_and_traffic(found: dict[str, Any]) -> None:
    steps_are_those_of_one_process(found)
    the_way_of_the_loop_is_no_matter(found["two"])
    the_way_of_the_loop_is_no_matter(found["four"])
    steps_are_judged_by_the_loss_of_all(found)
    gradients_and_messages_of_passes_are_left_alone(found["two"])
    runs_go_on_on_other_meshes(found)
    what_is_not_served_is_refused_by_name(found["two"])
    all_ranks_decide_together(found)
    owners_get_and_keep_what_the_page_says(found["two"])
    replicas_add_up_what_the_page_says(found["four"])
    factors_are_in_float32_where_parameters_are_not(found["two"])


def steps_are_those_of_one_process(found: dict[str, Any]) -> None:
    for name, values in everywhere(found["two"], "methods").items():
        assert distance(values, alone(name, Net(), vectors())) < 1e-10, name
        assert distance(values, parameters(Net())) > 1e-3, f"{name} has not moved"


def the_way_of_the_loop_is_no_matter(some: list[dict[str, Any]]) -> None:
    for name, values in everywhere(some, "ways").items():
        method, way = name.split(", ")
        build, _, _, data, loop = runs.WAYS[way]
        model = build()
        loop(make(method, model), model, data())
        assert distance(values, parameters(model)) < 1e-10, name


def steps_are_judged_by_the_loss_of_all(found: dict[str, Any]) -> None:
    alone = runs.judged(())
    assert any(alone["rejected"][2]) and not all(alone["rejected"][2])
    for some in found["two"], found["four"]:
        for case in some[0]["judged"]:
            values, damping, back = alone[case]
            for rank in some:
                own, its_damping, taken_back = rank["judged"][case]
                assert same(own, some[0]["judged"][case][0]), case
                assert distance(own, values) < 1e-10 and taken_back == back, case
                assert its_damping == pytest.approx(damping, rel=1e-12), case


def gradients_and_messages_of_passes_are_left_alone(two: list[dict[str, Any]]) -> None:
    for rank in two:
        of = rank["undisturbed"]
        for name, (gradients, messages, kinds) in of.items():
            reshards = name.split(", ")[1]
            plain = of[f"None, {reshards}"]
            assert same(gradients, plain[0]), name
            assert kinds == plain[2] == ["DTensor"] * len(kinds), name
            # Parameters stay whole from the forward pass on, as they do with reshard_after_forward=False.
            watched = of["None, False"] if name.startswith("kfac") or name.startswith("mixed") else plain
            assert messages == watched[1] and messages, name


def runs_go_on_on_other_meshes(found: dict[str, Any]) -> None:
    for part in (found["four"], "loaded"), ([{"one": found["one"]}], "one"):
        values = everywhere(*part)
        assert values.keys() == set(runs.SAVED)
        for name, loaded in values.items():
            assert distance(loaded, uninterrupted(name)) < 1e-10, (part[1], name)
    for name, values in everywhere(found["two"], "reloaded").items():
        assert distance(values, uninterrupted(name.removesuffix(" again"))) < 1e-10, name
    for name, saved in found["two"][0]["saved"].items():  # a plain state, into one process
        model = Net()
        alone(name, model, vectors(5)[:2], **runs.OPTIONS)
        optimizer = make(name, model, **runs.OPTIONS)
        optimizer.load_state_dict(saved)
        train(optimizer, model, vectors(5)[2:])
        assert distance(parameters(model), uninterrupted(name)) < 1e-10, name


def what_is_not_served_is_refused_by_name(two: list[dict[str, Any]]) -> None:
    for rank in two:
        told = rank["refusals"]
        assert told.keys() == TOLD.keys()
        assert {name: told[name] for name, words in TOLD.items() if not re.search(words, told[name])} == {}


def all_ranks_decide_together(found: dict[str, Any]) -> None:
    """One skips, and a block keeps its last inverse: all do."""
    for some in (found["two"], found["four"]):
        assert all(rank["measured"][0] == pytest.approx(rank["measured"][1], rel=1e-9) for rank in some)
        first = some[0]["disagreements"]
        for rank in some:
            of = rank["disagreements"]
            assert of["skipped"] == (1, 0, 1)
            assert same(of["parameters"], first["parameters"])
        failing = some[1]["disagreements"]["failures"][1]  # of the rank that failed
        assert all(rank["disagreements"]["failures"][0] == {failing: 1} for rank in some)


def owners_get_and_keep_what_the_page_says(two: list[dict[str, Any]]) -> None:
    shapes = [(b, a) for a, b in pairwise(runs.SIZES)]
    gradient = sum(b * a + b for b, a in shapes)
    sums = sum(1 + d * (d + 1) // 2 for b, a in shapes for d in (b, a + 1))
    spectra = sum(1 + b * (a + 1) for b, a in shapes)
    for name, extra in {"KFAC": 0, "EKFAC": spectra}.items():
        for step in range(4):
            given = [rank["traffic"][f"{name}, {step}"] for rank in two]
            statistics = step % 2 == 0
            # To the owners and back: each row that is not the owner's own, twice; half of them with two processes.
            assert sum(map(sum, given)) >= gradient
            directions = [numbers[-2:] for numbers in given]
            assert sum(map(sum, directions)) == gradient, (name, step)
            rest = sum(map(sum, given)) - gradient
            momenta = gradient // 2 if statistics and step else 0
            assert rest == (sums + extra * (step > 0 or name == "EKFAC") if statistics else 0) + momenta, (name, step)
        kept = [rank["traffic"][f"{name}, kept"] for rank in two]
        assert len({block for blocks, _ in kept for block in blocks}) == len(shapes) == sum(len(b) for b, _ in kept)
        assert all(0 < len(blocks) < number == len(shapes) for blocks, number in kept)


def replicas_add_up_what_the_page_says(four: list[dict[str, Any]]) -> None:
    """Two replicas of two shards: twice what one sends, and the sums of each owner between them, there and back."""
    shapes = [(b, a) for a, b in pairwise(runs.SIZES)]
    gradient = sum(b * a + b for b, a in shapes)
    sums = {n: sum(1 + d * (d + 1) // 2 for d in (b, a + 1)) for n, (b, a) in enumerate(shapes)}
    owned = [sum(sums[int(name[0])] for name in rank["traffic"]["KFAC, kept"][0]) for rank in four]
    assert sum(owned) == 2 * sum(sums.values())  # each block lies on one rank of each replica
    for step in range(4):
        given = [rank["traffic"][f"KFAC, {step}"] for rank in four]
        if step % 2:
            assert all(len(numbers) == 2 for numbers in given) and sum(map(sum, given)) == 2 * gradient
            continue
        assert all(len(numbers) == (7 if step else 5) for numbers in given)
        between = sum(owned) // 2 + sum(-(-own // 2) for own in owned)  # scattered; gathered, padded by at most one
        momenta = gradient + 4 * 2 * len(shapes) if step else 0  # and the length of that of each parameter
        assert sum(map(sum, given)) == 2 * gradient + 2 * sum(sums.values()) + between + momenta, step


def factors_are_in_float32_where_parameters_are_not(two: list[dict[str, Any]]) -> None:
    model = Net().float()
    optimizer = make("kfac exact", model, damping=0.1)
    train(optimizer, model, [(x.float(), y) for x, y in vectors()])
    for rank in two:
        of = rank["low_precision"]
        assert of["dtypes"] == {"torch.float32"}
        assert all(p.dtype == torch.float32 for p in of["parameters"])
        # bfloat16 has 8 bits: each product is off by 2e-3 of its size.
        assert 0 < distance(of["parameters"], parameters(model)) < 2e-2


def test_blocks_that_share_a_parameter_stay_together() -> None:
    parts = {"w[0:4]": ["w"], "w[4:8]": ["w"], "b": ["b"], "w+b": ["w", "b"], "x": ["x"]}
    columns = assigned(dict.fromkeys(parts, 5), 2, {}, {}, parts)
    assert {columns[name] for name in parts if name != "x"} == {0} and columns["x"] == 1
    with pytest.raises(RuntimeError, match="share a parameter now, and are kept by several processes"):
        assigned({"w+b": 1}, 2, {"w": 0, "b": 1}, {}, {"w": ["w"], "b": ["b"], "w+b": ["w", "b"]})
