"""Are as many messages and numbers sent as the page on several processes says, and is each sum whole?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precond import EKFAC, KFAC, Refresh
from precond.distributed.assignment import assigned, cost
from precond.distributed.ranks import copies
from precond.distributed.triangles import pack, packed_size, tree_sum, unpack
from tests.distributed_run import ranks
from tests.precond.distributed.checks import fractions

SIZES = (6, 5, 4, 3)
BATCH = 8


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Numbers that this rank gives to each collective; those of decisions apart from those of tensors."""
    found: dict[str, list[int]] = {"decisions": [], "all_to_all": [], "all_gather": [], "objects": []}
    own = dist.all_to_all_single, dist.all_gather, dist.all_reduce, dist.all_gather_object

    def all_to_all(out: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["all_to_all"].append(given.numel())
        return own[0](out, given, *args, **kwargs)

    def all_gather(out: list[Tensor], given: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Decisions travel in float64, and the tensors of these tests in float32.
        found["decisions" if given.dtype == torch.float64 else "all_gather"].append(given.numel())
        return own[1](out, given, *args, **kwargs)

    def all_reduce(given: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["decisions"].append(given.numel())
        return own[2](given, *args, **kwargs)

    def objects(*args: Any, **kwargs: Any) -> Any:
        found["objects"].append(1)
        return own[3](*args, **kwargs)

    dist.all_to_all_single, dist.all_gather = all_to_all, all_gather
    dist.all_reduce, dist.all_gather_object = all_reduce, objects
    try:
        yield found
    finally:
        dist.all_to_all_single, dist.all_gather, dist.all_reduce, dist.all_gather_object = own


def sent(cls: Any, fraction: float) -> list[dict[str, list[int]]]:
    """What is sent in each step; statistics and inverses are due in every second one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(SIZES)))
    parallel = DistributedDataParallel(model)
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
    return out


def of_all() -> dict[str, Any]:
    names = {"KFAC": KFAC, "EKFAC": EKFAC}
    found: dict[str, Any] = {f"{n}, {f}": sent(cls, f) for n, cls in names.items() for f in fractions()}
    return found | {"draws": draws()}


def draws() -> dict[str, Any]:
    """The same data on all ranks: averages of many sampled factors, and those of each rank before they are added."""
    model = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, nn.CrossEntropyLoss(), lr=0.0, curvature_ema=0.0)
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


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return ranks(of_all, 2, timeout=200)


@pytest.mark.distributed
def test_numbers_that_are_sent_are_those_of_the_page(results: list[dict[str, Any]]) -> None:
    world = 2
    layers = list(pairwise(SIZES))
    shapes = [(b, a + 1) for a, b in layers]
    sums = sum(1 + d * (d + 1) // 2 for shape in shapes for d in shape)  # with the weight of each
    spectra = sum(1 + b * a for b, a in shapes)
    for key, steps in results[0].items():
        if key == "draws":
            continue
        method, _, fraction = key.partition(", ")
        columns = world // copies(float(fraction), world)
        costs = {str(i): cost({"A": ((a, a), True), "B": ((b, b), True)}) for i, (b, a) in enumerate(shapes)}
        owner = assigned(costs, columns, {}, {})
        longest = max(sum(b * a for i, (b, a) in enumerate(shapes) if owner[str(i)] == c) for c in range(columns))
        for number, step in enumerate(steps):
            if number % 2:
                assert step["all_to_all"] == [] and step["objects"] == []
                assert step["all_gather"] == ([] if columns == 1 else [longest]), (key, number)
                assert step["decisions"] == ([4, 2] if columns == 1 else [4, 1, 2])
                continue
            if method == "KFAC":
                assert step["all_to_all"] == [sums]
                assert step["all_gather"] == ([-(-sums // world)] if columns == 1 else [longest])
            elif number:
                assert step["all_to_all"] == [sums + spectra]
            assert len(step["objects"]) <= (number == 0) * 3


@pytest.mark.distributed
def test_draws_differ_between_ranks_and_are_unbiased(results: list[dict[str, Any]]) -> None:
    one, other = (result["draws"] for result in results)
    assert torch.equal(one["factors"], other["factors"])
    assert not torch.equal(one["own"], other["own"])
    mean, spread = one["factors"].mean(0), one["factors"].std(0) / 200**0.5
    expected = torch.eye(3, dtype=torch.float64) / 3 - 1 / 9
    assert ((mean - expected).abs() <= 4 * spread + 1e-12).all()


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
