"""Do layer-based methods under DistributedDataParallel take the steps of one process on all the data?"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precond import KFAC
from tests.distributed_run import ranks
from tests.precond.distributed.checks import (
    METHODS,
    Conv,
    Net,
    accumulated,
    alone,
    distance,
    fractions,
    images,
    in_parallel,
    make,
    mine,
    parameters,
    same,
    train,
    vectors,
)
from tests.precond.distributed.loops import LOOPS, every_loop, loop
from tests.precond.distributed.moving import MOVED, RUNS, joined, joined_alone, moved, of_a_team, teams, uninterrupted

pytestmark = pytest.mark.distributed

#: Ways to wrap the model.
WRAPS: dict[str, dict[str, Any]] = {
    "static graph": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},
}


def every_method() -> dict[str, list[Tensor]]:
    return {name: in_parallel(name, Net(), vectors(), {}) for name in METHODS}


def every_way() -> dict[str, list[Tensor]]:
    out = {}
    for name in ("kfac exact", "kfac empirical", "ekfac"):
        for way, wrap in WRAPS.items():
            out[f"{name}, {way}"] = in_parallel(name, Net(), vectors(), wrap)
        model = Net()
        parallel = DistributedDataParallel(model)
        accumulated(make(name, parallel), parallel, vectors())
        out[f"{name}, no_sync"] = parameters(model)
        model = Net()
        optimizer = make(name, model)  # made before the model is wrapped
        train(optimizer, DistributedDataParallel(model), vectors())
        out[f"{name}, inner"] = parameters(model)
        out[f"{name}, images"] = in_parallel(name, Conv(), images(), {})
    return out


def every_fraction() -> dict[str, list[Tensor]]:
    out = {}
    for name in METHODS:
        if name not in ("kbfgs", "kfac empirical", "natural unit", "natural diagonal", "singd block"):
            for fraction in fractions():
                if fraction < 1:
                    out[f"{name}, {fraction}"] = in_parallel(name, Net(), vectors(), {}, memory_fraction=fraction)
    return out


def kept(fraction: float) -> tuple[int, int]:
    """Numbers in factors and in inverses that a rank keeps."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(8))).double()
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, nn.CrossEntropyLoss(), lr=0.1, memory_fraction=fraction)
    x, y = vectors(1)[0]
    optimizer.loss_fn(parallel(x.repeat(1, 2)[:, :6][mine(16)]), y[mine(16)]).backward()
    optimizer.step()
    factors = inverses = 0
    for preconditioner in optimizer.preconditioners.values():
        if preconditioner.inverse is not None:
            inverses += sum(f.matrix.numel() for f in preconditioner.inverse.factors)
        sides = preconditioner.estimator.sides.values()
        factors += sum(m.value.numel() for pair in sides for m in pair if m.value is not None)
    return factors, inverses


def resumed() -> dict[str, list[Tensor]]:
    """Runs that were saved at one fraction and go on at another; statistics are due at the second step after it."""
    out = {}
    for name in ("kfac exact", "ekfac", "natural dense"):
        for before in fractions():
            for after in (fraction for fraction in fractions() if fraction != before):
                options = {"curvature_update_period": 3, "inverse_update_period": 3}
                model = Net()
                parallel = DistributedDataParallel(model)
                optimizer = make(name, parallel, memory_fraction=before, **options)
                train(optimizer, parallel, vectors(5)[:2])
                saved = optimizer.state_dict()
                optimizer = make(name, parallel, memory_fraction=after, **options)
                optimizer.load_state_dict(saved)
                train(optimizer, parallel, vectors(5)[2:])
                out[f"{name}, {before}, {after}"] = parameters(model)
                out[f"{name}, {before}"] = saved
    return out


def all_of_it() -> dict[str, Any]:
    return {
        "methods": every_method(),
        "ways": every_way(),
        "fractions": every_fraction(),
        "resumed": resumed(),
        "loops": every_loop(),
        "kept": {fraction: kept(fraction) for fraction in fractions()},
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks(all_of_it, 2, timeout=400)


def assert_equal_everywhere(found: list[dict[str, Any]], part: str) -> dict[str, list[Tensor]]:
    first: dict[str, list[Tensor]] = found[0][part]
    for name, values in first.items():
        assert all(same(values, other[part][name]) for other in found), f"{name} differs between ranks"
    return first


def test_every_method_takes_the_steps_of_one_process(found: list[dict[str, Any]]) -> None:
    for name, values in assert_equal_everywhere(found, "methods").items():
        assert distance(values, alone(name, Net(), vectors())) < 1e-10, name
        assert distance(values, parameters(Net())) > 1e-3, f"{name} has not moved"


def test_however_the_model_is_wrapped_and_the_gradient_accumulated(found: list[dict[str, Any]]) -> None:
    for name, values in assert_equal_everywhere(found, "ways").items():
        method, way = name.split(", ")
        model, batches = (Conv(), images()) if way == "images" else (Net(), vectors())
        assert distance(values, alone(method, model, batches)) < 1e-10, name


def test_loops_whose_ranks_differ_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for name, values in assert_equal_everywhere(found, "loops").items():
        method, way = name.split(", ", 1)
        assert distance(values, loop(method, way)) < 1e-10, name
        assert distance(values, parameters(LOOPS[way][0]())) > 1e-3, f"{name} has not moved"


def test_each_fraction_takes_the_same_steps(found: list[dict[str, Any]]) -> None:
    whole = found[0]["methods"]
    for name, values in assert_equal_everywhere(found, "fractions").items():
        assert same(values, whole[name.split(", ")[0]]), name


def test_a_run_goes_on_at_another_fraction(found: list[dict[str, Any]]) -> None:
    options = {"curvature_update_period": 3, "inverse_update_period": 3}
    methods = {name.split(", ")[0] for name in found[0]["resumed"]}
    uninterrupted = {method: alone(method, Net(), vectors(5), **options) for method in methods}
    for name, values in found[0]["resumed"].items():
        method, *runs = name.split(", ")
        expected = uninterrupted[method]
        if len(runs) == 1:  # goes on in one process
            model = Net()
            alone(method, model, vectors(5)[:2], **options)
            optimizer = make(method, model, **options)
            optimizer.load_state_dict(values)
            train(optimizer, model, vectors(5)[2:])
            assert distance(parameters(model), expected) < 1e-10, name
            continue
        assert same(values, found[1]["resumed"][name]), name
        assert distance(values, expected) < 1e-10, name


def test_memory_falls_with_the_fraction(found: list[dict[str, Any]]) -> None:
    size = len(found)
    whole = found[0]["kept"][1.0]
    assert whole == (8 * (7 * 7 + 6 * 6), 8 * (7 * 7 + 6 * 6))
    for fraction, numbers in found[0]["kept"].items():
        shares = [other["kept"][fraction] for other in found]
        assert [sum(column) for column in zip(*shares, strict=True)] == [fraction * size * n for n in whole]
        assert numbers == tuple(fraction * n for n in whole)


def four(folder: str) -> dict[str, Any]:
    out = {}
    for name in ("kfac exact", "ekfac"):
        for fraction in fractions():
            out[f"{name}, {fraction}"] = in_parallel(name, Net(), vectors(), {}, memory_fraction=fraction)
    assert dist.get_world_size() == 4
    return {"four": out, "moved": moved(folder), "joined": joined(), "teams": teams()}


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks(four, 4, str(tmp_path_factory.mktemp("checkpoints")), timeout=400)


def test_a_run_goes_on_with_twice_and_with_half_the_processes(of_four: list[dict[str, Any]]) -> None:
    results = assert_equal_everywhere(of_four[:2], "moved")
    expected = {name: uninterrupted(name) for name in MOVED}
    assert results.keys() == {f"{name}, {way}" for name, way in RUNS}
    for name, values in results.items():
        assert distance(values, expected[name.split(", ")[0]]) < 1e-10, name


def test_gradient_methods_train_on_unequal_data_under_join(of_four: list[dict[str, Any]]) -> None:
    for name, values in assert_equal_everywhere(of_four, "joined").items():
        assert distance(values, joined_alone(name)) < 1e-10, name


def test_teams_of_ranks_train_models_of_their_own(of_four: list[dict[str, Any]]) -> None:
    for team in (0, 1):
        expected = of_a_team(team)
        for name, values in assert_equal_everywhere(of_four[2 * team : 2 * team + 2], "teams").items():
            assert distance(values, expected) < 1e-10, name
            assert distance(values, of_a_team(1 - team)) > 1e-3, name


def test_four_processes_in_rows_and_columns(of_four: list[dict[str, Any]]) -> None:
    results = assert_equal_everywhere(of_four, "four")
    for name, values in results.items():
        method = name.split(", ")[0]
        assert distance(values, alone(method, Net(), vectors())) < 1e-10, name
        assert same(values, results[f"{method}, 1.0"]), name
