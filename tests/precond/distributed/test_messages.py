"""Are as many messages and numbers sent as the page on several processes says, and is each sum whole?"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import precond
import solvers
from precond import EKFAC, KFAC, Refresh
from precond.distributed.assignment import assigned, cost
from precond.distributed.ranks import MESSAGE, copies, gathering
from precond.distributed.triangles import pack, packed_size, tree_sum, unpack
from tests.distributed_run import ranks
from tests.precond.distributed.checks import fractions

SIZES = (6, 5, 4, 3)
BATCH = 8


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Numbers that this rank gives to each collective, decisions apart from tensors; and bytes that leave it."""
    found: dict[str, list[int]] = {"decisions": [], "all_to_all": [], "all_gather": [], "objects": [], "sent": []}
    own = dist.all_to_all_single, dist.all_gather, dist.all_reduce

    def all_to_all(out: Tensor, given: Tensor, into: list[int], sizes: list[int], *, group: Any) -> Any:
        if given.dtype == torch.uint8:
            found["objects"].append(1)
            return own[0](out, given, into, sizes, group=group)
        found["all_to_all"].append(given.numel())
        found["sent"].append(given.itemsize * (given.numel() - sizes[dist.get_rank(group)]))
        return own[0](out, given, into, sizes, group=group)

    def all_gather(out: list[Tensor], given: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Decisions travel in float64, and the tensors of these tests in float32.
        if given.dtype == torch.uint8:
            found["objects"].append(1)
            return own[1](out, given, *args, **kwargs)
        decides = given.dtype == torch.float64
        found["decisions" if decides else "all_gather"].append(given.numel())
        if not decides:
            found["sent"].append(given.nbytes * (len(out) - 1))
        return own[1](out, given, *args, **kwargs)

    def all_reduce(given: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["decisions"].append(given.numel())
        return own[2](given, *args, **kwargs)

    dist.all_to_all_single, dist.all_gather, dist.all_reduce = all_to_all, all_gather, all_reduce
    try:
        yield found
    finally:
        dist.all_to_all_single, dist.all_gather, dist.all_reduce = own


def sent(cls: Any, fraction: float) -> list[dict[str, Any]]:
    """What is sent in each step; statistics and inverses are due in every second one. At last what is held."""
    parallel = DistributedDataParallel(network())
    optimizer = cls(
        parallel,
        nn.CrossEntropyLoss(),
        lr=0.1,
        fisher="exact",
        curvature_update_period=2,
        inverse_update_period=Refresh(2, stagger=False),
        memory_fraction=fraction,
    )
    out = []
    for _ in range(4):
        x, y = torch.randn(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,))
        optimizer.zero_grad()
        optimizer.loss_fn(parallel(x), y).backward()
        with counted() as found:
            optimizer.step()
        out.append(found)
    return [*out, held(optimizer)]


def held(optimizer: Any) -> dict[str, int]:
    """Bytes of averages, inverses and eigenbases that this rank keeps."""
    averages = inverses = bases = 0
    for kept in optimizer.preconditioners.values():
        means = [mean.value for mean in kept.estimator.means().values() if mean.value is not None]
        shared = list(kept.estimator.shared().values())
        known = {x.data_ptr() for x in shared}
        found = [] if kept.inverse is None else leaves(solvers.state(kept.inverse))
        averages += sum(x.nbytes for x in means)
        bases += sum(x.nbytes for x in shared)
        inverses += sum(x.nbytes for x in found if x.data_ptr() not in known and x.ndim)
    return {"averages": averages, "inverses": inverses, "bases": bases}


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    entries = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [x for entry in entries for x in leaves(entry)]


def network(sizes: tuple[int, ...] = SIZES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def alike() -> dict[str, dict[str, int]]:
    """What a rank holds of a model whose layers are all alike, by fraction."""
    out = {}
    for fraction in fractions():
        parallel = DistributedDataParallel(network((6,) * 9))
        optimizer = KFAC(parallel, nn.CrossEntropyLoss(), lr=0.1, fisher="exact", memory_fraction=fraction)
        optimizer.loss_fn(parallel(torch.randn(BATCH, 6)), torch.randint(6, (BATCH,))).backward()
        optimizer.step()
        out[f"{fraction}"] = held(optimizer)
    return out


def of_all() -> dict[str, Any]:
    names = {"KFAC": KFAC, "EKFAC": EKFAC}
    found: dict[str, Any] = {f"{n}, {f}": sent(cls, f) for n, cls in names.items() for f in fractions()}
    return found | {"draws": draws() if dist.get_world_size() == 2 else {}, "alike": alike()}


def draws() -> dict[str, Any]:
    """The same data on all ranks: averages of many sampled factors, and those of each rank before they are added."""
    model = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, nn.CrossEntropyLoss(), lr=0.0, curvature_ema=0.0, curvature_update_period=1)
    x, y = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    found, own = [], []
    for _ in range(200):
        optimizer.zero_grad()
        optimizer.loss_fn(parallel(x), y).backward()
        (preconditioner,) = optimizer.preconditioners.values() or [None]
        if preconditioner is not None:
            own.append(preconditioner.estimator.step_means()["straight.B"].step_sum()[0].diagonal().clone())
        optimizer.step()
        (preconditioner,) = optimizer.preconditioners.values()
        found.append(preconditioner.estimator.sides["straight"][1].value.clone())
    return {"factors": torch.stack(found), "own": torch.stack(own)}


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return ranks(of_all, request.param, timeout=300)


@pytest.mark.distributed
def test_numbers_that_are_sent_are_those_of_the_page(results: list[dict[str, Any]]) -> None:
    world = len(results)
    layers = list(pairwise(SIZES))
    shapes = [(b, a + 1) for a, b in layers]
    sums = [sum(1 + d * (d + 1) // 2 for d in shape) for shape in shapes]  # with the weight of each
    spectra = [1 + b * a for b, a in shapes]
    for rank, result in enumerate(results):
        for key in (key for key in result if "KFAC" in key):
            steps = result[key][:-1]
            method, _, fraction = key.partition(", ")
            kept = copies(float(fraction), world)
            columns = world // kept
            costs = {str(i): cost({"A": ((a, a), True), "B": ((b, b), True)}) for i, (b, a) in enumerate(shapes)}
            owner = assigned(costs, columns, {}, {})
            mine = [i for i in range(len(shapes)) if owner[str(i)] == rank % columns]
            sizes = [sum(b * a for i, (b, a) in enumerate(shapes) if owner[str(i)] == c) for c in range(columns)]
            evened = gathering(sizes)[1] == 2  # first made equally long
            moved = [sizes[rank % columns]] if evened else []
            directions = [-(-sum(sizes) // columns) if evened else max(sizes)] if columns > 1 else []
            for number, step in enumerate(steps):
                if number % 2:
                    assert step["all_to_all"] == moved and step["objects"] == []
                    assert step["all_gather"] == directions, (key, number)
                    assert step["decisions"] == [MESSAGE] * (2 if columns == 1 else 3)
                    continue
                assert len(step["objects"]) <= (number == 0) * 6
                if method == "EKFAC" and not number:
                    continue
                each = [s + (p if method == "EKFAC" else 0) for s, p in zip(sums, spectra, strict=True)]
                own = sum(each[i] for i in mine)
                parts = [sum(each)] * (columns > 1) + [own] * (kept > 1)
                assert step["all_to_all"][: len(parts)] == parts, (key, number)
                if method == "KFAC":
                    assert step["all_gather"] == [-(-own // kept)] * (kept > 1) + directions
                    assert step["all_to_all"] == parts + moved, (key, number)


@pytest.mark.distributed
@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_a_plan_counts_what_is_sent_and_held(results: list[dict[str, Any]], method: type[Any]) -> None:
    world = len(results)
    for kept in (k for k in range(1, world + 1) if world % k == 0):
        options = functools.partial(method, fisher="exact")
        with torch.device("meta"):
            found = precond.plan(network(), world_size=world, optimizer=options, memory_fraction=kept / world)
        for rank, result in enumerate(results):
            *steps, memory = result[f"{method.__name__}, {kept / world}"]
            between, both = steps[1], steps[2]
            assert sum(between["sent"]) == found.stepping[rank]
            assert sum(both["sent"]) == found.stepping[rank] + found.updating[rank] + found.refreshing[rank]
            assert len(between["decisions"] + between["sent"]) == found.messages["step"]
            assert len(both["decisions"] + both["sent"]) == sum(found.messages.values())
            expected = {"averages": found.factors[rank], "inverses": found.inverses[rank], "bases": found.bases[rank]}
            assert memory == expected, (kept, rank)


def test_a_plan_of_one_process_counts_what_it_holds() -> None:
    for method in (KFAC, EKFAC):
        model = network()
        optimizer = method(model, nn.CrossEntropyLoss(), lr=0.1, fisher="exact")
        optimizer.loss_fn(model(torch.randn(BATCH, SIZES[0])), torch.randint(SIZES[-1], (BATCH,))).backward()
        optimizer.step()
        found = precond.plan(network(), world_size=1, optimizer=method)
        assert held(optimizer) == {"averages": found.factors[0], "inverses": found.inverses[0], "bases": found.bases[0]}
        assert found.stepping == found.updating == found.refreshing == [0]


@pytest.mark.distributed
def test_what_a_rank_holds_falls_with_the_fraction(results: list[dict[str, Any]]) -> None:
    world = len(results)
    for result in results:
        whole = result["alike"]["1.0"]
        for fraction, part in result["alike"].items():
            for what in ("averages", "inverses"):
                assert part[what] * world == whole[what] * float(fraction) * world, (fraction, what)


@pytest.mark.distributed
def test_draws_differ_between_ranks_and_are_unbiased(results: list[dict[str, Any]]) -> None:
    if len(results) > 2:
        return
    one, other = (result["draws"] for result in results)
    assert torch.equal(one["factors"], other["factors"])
    assert not torch.equal(one["own"], other["own"])
    mean, spread = one["factors"].mean(0), one["factors"].std(0) / 200**0.5
    expected = torch.eye(3, dtype=torch.float64) / 3 - 1 / 9
    assert ((mean - expected).abs() <= 4 * spread + 1e-12).all()


@pytest.mark.parametrize("sizes", [[5], [3, 1], [9, 0, 0], [0, 0, 100, 1], [35, 24, 15, 0], [7, 7, 6]])
def test_parts_that_differ_in_length_are_gathered_without_padding(sizes: list[int]) -> None:
    """Never more than by padding leaves a process; and not much more than all of it where one has nearly all."""
    sent, messages = gathering(sizes)
    others, total = len(sizes) - 1, sum(sizes)
    assert max(sent) <= others * max(sizes) and messages <= 2
    if messages == 2:
        assert all(n >= others * total / len(sizes) for n in sent)
        assert max(sent) < others * (total / len(sizes) + 1) + max(sizes)
        assert sum(sent) < others * (total + len(sizes)) + total


@pytest.mark.parametrize("d", range(1, 8))
def test_triangles_come_back(d: int) -> None:
    matrix = torch.randn(3, d, d, dtype=torch.float64)
    matrix = matrix + matrix.mT
    packed = pack(matrix)
    assert packed.numel() == packed_size(matrix.shape) == 3 * d * (d + 1) // 2
    assert torch.equal(unpack(packed, matrix.shape), matrix)


def test_halves_of_a_sum_are_sums_on_the_way() -> None:
    parts = list(torch.randn(8, 5, dtype=torch.float64).unbind())
    assert torch.equal(tree_sum(parts), tree_sum([tree_sum(parts[:4]), tree_sum(parts[4:])]))
    assert torch.equal(tree_sum(parts), tree_sum([tree_sum(parts[i : i + 2]) for i in range(0, 8, 2)]))


def test_blocks_stay_where_they_are_when_others_come() -> None:
    costs = {"a": 8, "b": 5, "c": 4}
    first = assigned(costs, 2, {}, {})
    assert first == {"a": 0, "b": 1, "c": 1}
    later = assigned({"d": 3}, 2, first, costs)
    assert later == {**first, "d": 0}


@pytest.mark.parametrize("fraction", [0.3, 0.0, 1 / 3])
def test_a_fraction_that_divides_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="with so many it is 1/4, 1/2, 1"):
        copies(fraction, 4)
    assert [copies(k / 4, 4) for k in (1, 2, 4)] == [1, 2, 4]
