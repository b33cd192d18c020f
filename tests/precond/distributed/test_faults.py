"""Does what goes wrong on one rank end on all ranks, in time and in words?"""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import curvature
from curvature.model.messages import ProcessLost
from precond import KFAC, SOAP, LevenbergMarquardt, QuadraticModel, WeightDecay
from precond.distributed import curvature as shared
from precond.distributed import exchange, reduction, shard_messages
from precond.distributed.ranks import OtherRankFailed, Ranks
from precond.distributed.reduction import Item
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.dampings import Dampings
from precond.layerwise.replay import LoopReplay
from precond.step import divergence
from tests.distributed_run import outcomes, ranks
from tests.precond.distributed.checks import Net, alone, averaged, distance, make, mine, parameters, same, vectors
from tests.precond.distributed.sharded_runs import METHODS, batch, mesh_of, shard, square, whole
from tests.precond.distributed.sharded_runs import steps as rank_steps

pytestmark = pytest.mark.distributed

MODEL = {"lr": 1.0, "step_size": QuadraticModel()}
JUDGED = {"damping_rule": LevenbergMarquardt(reject_steps=True)}


class Memory(RuntimeError):
    """Stands for the error of an allocation."""


@contextmanager
def broken(owner: Any, name: str, after: int = 0) -> Iterator[None]:
    """A function that raises on rank 1, from its call number ``after`` on."""
    own, calls = getattr(owner, name), 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if dist.get_rank() == 1 and calls > after:
            raise Memory(f"no memory in {name}")
        return own(*args, **kwargs)

    setattr(owner, name, fails)
    try:
        yield
    finally:
        setattr(owner, name, own)


#: Where a step of rank 1 fails -> the options of the optimizer, the object and its function.
PLACES: dict[str, tuple[dict[str, Any], Callable[[Any], tuple[Any, str]]]] = {
    "before the first message": ({}, lambda o: (o, "with_gradient")),
    "statistics": ({}, lambda o: (o.statistics, "close")),
    "a product with an inverse": ({}, lambda o: (o.preconditioners, "apply")),
    "between two messages": ({}, lambda o: (o, "keep_time")),
    "the bound on the move": ({}, lambda o: (o, "shortened")),
    "refresh": ({"inverse_update_period": 1}, lambda o: (Dampings, "of")),
    "passes of the quadratic model": (MODEL, lambda o: (LoopReplay, "gram")),
    "loss of the quadratic model": (MODEL, lambda o: (LoopReplay, "value")),
    "judgement of a step": (JUDGED, lambda o: (LoopReplay, "value")),
}


#: As :data:`PLACES`, where a message of directions is at work: below fraction 1.
PLACES_OF_PARTS: dict[str, tuple[dict[str, Any], Callable[[Any], tuple[Any, str]]]] = {
    "packing sums": ({}, lambda o: (Item, "packed")),
    "memory for sums": ({}, lambda o: (Ranks, "summing")),
    "taking sums": ({}, lambda o: (Item, "take")),
    "memory for directions": ({}, lambda o: (reduction, "gathering_of")),
    "directions of others": ({}, lambda o: (o.preconditioners, "apply")),
    "memory for lengths": ({"momentum": 0.9, "inverse_update_period": 1}, lambda o: (shared, "gathering_of")),
}
#: Where a step on shards fails: of methods that use gradients alone, and of layer-based ones.
PLACES_OF_SHARDS: dict[str, dict[str, Callable[[Any], tuple[Any, str]]]] = {
    "SOAP": {
        "norm of gradients": lambda o: (divergence, "_row"),
        "decay": lambda o: (o, "regularized"),
        "packing gradients": lambda o: (exchange, "_buckets"),
        "whole gradients": lambda o: (shard_messages.Gather, "wholes"),
        "directions": lambda o: (o, "whole_directions"),
        "packing directions": lambda o: (shard_messages.Spread, "fill"),
        "taking directions": lambda o: (shard_messages.Spread, "parts"),
        "bound": lambda o: (o, "shortened"),
        "new values": lambda o: (o, "update_options"),
        "are results fit": lambda o: (o, "touched"),
    },
    "KFAC": {
        "statistics": lambda o: (o.statistics, "close"),
        "packing sums": lambda o: (Item, "packed"),
        "taking sums": lambda o: (Item, "take"),
        "whole momenta": lambda o: (shard_messages.Gather, "wholes"),
        "directions": lambda o: (o.preconditioners, "apply"),
        "taking directions": lambda o: (shard_messages.Spread, "parts"),
        "bound": lambda o: (o, "shortened"),
        "new values": lambda o: (o, "update_options"),
    },
}


def backward(model: nn.Module, call: Callable[[Tensor], Tensor], step: int, loss_fn: nn.Module) -> None:
    x, y = vectors()[step]
    model.zero_grad()
    loss_fn(call(x[mine(16)]), y[mine(16)]).backward()


def caught(work: Callable[[], Any]) -> tuple[str, str]:
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def steps_that_fail() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for fraction in (1.0, 0.5):
        for name, (options, place) in (PLACES if fraction == 1 else PLACES | PLACES_OF_PARTS).items():
            model = Net()
            parallel = DistributedDataParallel(model)
            optimizer = make("kfac exact", parallel, memory_fraction=fraction, **options)
            for step in range(2):
                backward(model, parallel, step, optimizer.loss_fn)
                optimizer.step()
            before = parameters(model)
            backward(model, parallel, 2, optimizer.loss_fn)
            with broken(*place(optimizer)):
                told = caught(optimizer.step)
            unchanged = same(before, parameters(model))
            optimizer.step()  # the same batch
            backward(model, parallel, 3, optimizer.loss_fn)
            optimizer.step()
            out[f"{name}, {fraction}"] = told, unchanged, parameters(model)
    return out


def states_that_fail() -> tuple[str, str]:
    """``state_dict`` where each rank has a part of it."""
    parallel = DistributedDataParallel(Net())
    optimizer = make("kfac exact", parallel, memory_fraction=0.5)
    backward(parallel.module, parallel, 0, optimizer.loss_fn)
    optimizer.step()
    with broken(Preconditioner, "state_dict"):
        told = caught(optimizer.state_dict)
    assert optimizer.state_dict()["state"]
    return told


def shards_that_fail() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for method, places in PLACES_OF_SHARDS.items():
        for name, place in places.items():
            net = shard(square(), mesh_of((2,)))
            optimizer = on_shards(method, net)
            rank_steps(net, optimizer, range(2))
            with broken(*place(optimizer)):
                told = caught(lambda net=net, optimizer=optimizer: rank_steps(net, optimizer, range(2, 3)))
            optimizer.step()  # the same batch
            rank_steps(net, optimizer, range(3, 4))
            out[f"{method}, {name}"] = told, whole(net)
    return out


#: What is wrong with the state that rank 1 is given; SOAP, local is that on the rows of each process.
SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no state": lambda state: {"step": 1},
    "an entry less": lambda state: {**state, "state": {**state["state"], 0: {"step": 1}}},
    "not finite": lambda state: {**state, "state": {**state["state"], 0: {**state["state"][0], "step": math.nan}}},
    "a group less": lambda state: {**state, "param_groups": []},
}


def loads_that_fail() -> dict[str, Any]:
    """On shards; and the steps after one that does not."""
    out: dict[str, Any] = {}
    for method in ("SOAP", "SOAP, local", "KFAC"):
        net, other = (shard(square(), mesh_of((2,))) for _ in range(2))
        first, second = on_shards(method, net), on_shards(method, other)
        rank_steps(net, first, range(2))
        state = first.state_dict()
        told = []
        for spoil in SPOILT.values():
            given = spoil(copy.copy(state)) if dist.get_rank() == 1 else state
            told.append(caught(lambda given=given, second=second: second.load_state_dict(given)))
        fresh = not second.state and not second.steps
        second.load_state_dict(state)
        other.load_state_dict(net.state_dict())
        for model, optimizer in ((net, first), (other, second)):
            rank_steps(model, optimizer, range(2, 4))
        out[method] = told, fresh, same(whole(net), whole(other))
    return out


def on_shards(method: str, net: nn.Module) -> Any:
    if method == "SOAP, local":
        return SOAP(net.parameters(), lr=0.02, shards="local")
    if method == "KFAC":
        return KFAC(net, nn.MSELoss(), lr=0.1, fisher="exact", momentum=0.9, inverse_update_period=1)
    return SOAP(net.parameters(), lr=0.02, weight_decay=WeightDecay(0.1, "l2"), kl_clip=1e-3)


def gradient_methods() -> tuple[Any, bool, Any]:
    model = Net()
    optimizer = SOAP(model.parameters(), lr=0.01, process_group=dist.group.WORLD)
    for step in range(3):
        backward(model, model, step, nn.CrossEntropyLoss())
        averaged(model)
        if step < 2:
            optimizer.step()
    before = parameters(model)
    with broken(optimizer, "shortened"):
        told = caught(optimizer.step)
        try:
            optimizer.step()
        except Exception:  # tried again while it is handled, and the error of that is one of both
            again = caught(optimizer.step)
    assert again[0] == told[0]
    unchanged = same(before, parameters(model))
    optimizer.step()
    return told, unchanged, parameters(model)


def matrices() -> dict[str, tuple[str, str]]:
    """Errors on rank 1 in the passes of matrices over data, or in the model that runs there."""
    x, y = vectors()[0]
    data, group, loss = [(x[mine(16)], y[mine(16)])], dist.group.WORLD, nn.CrossEntropyLoss()
    model = Net()
    H = curvature.hessian(model, loss, data, process_group=group, keep_graph=False)
    vector = torch.ones(H.shape[1], dtype=torch.float64)
    doors: dict[str, Callable[[], Any]] = {
        "product": lambda: H @ vector,
        "kfac": lambda: curvature.fisher(model, loss, data, structure="kfac", process_group=group),
        "dense": lambda: curvature.ggn(model, loss, data, structure="dense", process_group=group),
        "influence": lambda: curvature.influence(model, loss, data, (x, y), process_group=group),
        "report": lambda: curvature.report(model, loss, data, process_group=group),
    }
    out = {}
    for name, door in doors.items():
        with broken(model.norm, "forward"):
            out[name] = caught(door)
        assert torch.equal(H @ vector, H @ vector)  # the processes are still at one
    return out


class Shuffled(nn.Module):
    """A net whose layers are registered and called in drawn orders, with delays of their own.

    Args:
        seed: Of the order of the calls, and of the delays.
        registered: Of the order of registration.
    """

    def __init__(self, seed: int, registered: int) -> None:
        super().__init__()
        draw, register = random.Random(seed), random.Random(registered)
        layers = {f"layer{i}": nn.Linear(5, 5).double() for i in range(4)}
        generator = torch.Generator().manual_seed(0)
        for layer in layers.values():
            for p in layer.parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3)
        for name in register.sample(sorted(layers), 4):
            self.add_module(name, layers[name])
        for layer in draw.sample(list(layers.values()), 4):
            pause = draw.random() / 200
            layer.register_forward_hook(lambda *_, pause=pause: time.sleep(pause))
            layer.weight.register_hook(lambda _, pause=pause: time.sleep(pause))
        self.order = draw.sample(range(4), 4)

    def forward(self, x: Tensor) -> Tensor:
        # Branches that add up: the order of their calls is that of the backward pass, too.
        branches = {i: getattr(self, f"layer{i}")(x).tanh() for i in self.order}
        return sum(branches[i] for i in range(4))  # type: ignore[return-value]


def orders() -> dict[str, Any]:
    """Runs in which every rank calls its layers in an order of its own, and where it may, registers them so."""
    out = {}
    rank, world = dist.get_rank(), dist.get_world_size()
    for fraction in (1.0, 1 / world):
        for seed, wrapped in ((0, False), (1, False), (2, True), (3, True)):
            model = Shuffled(100 * seed + rank, seed if wrapped else 100 * seed + rank)
            parallel = DistributedDataParallel(model) if wrapped else model
            options = {} if wrapped else {"process_group": dist.group.WORLD}
            optimizer = KFAC(
                parallel,
                nn.CrossEntropyLoss(),
                lr=0.1,
                fisher="exact",
                memory_fraction=fraction,
                inverse_update_period=1,
                **options,
            )
            for step in range(3):
                backward(model, parallel, step, optimizer.loss_fn)
                for name in sorted(dict(model.named_parameters())) if not wrapped else ():
                    p = model.get_parameter(name)
                    dist.all_reduce(p.grad)
                    p.grad /= world  # type: ignore[operator]
                optimizer.step()
            out[f"{seed}, {fraction}"] = {n: p.detach().clone() for n, p in sorted(model.named_parameters())}
    return out


def decisions() -> list[Any]:
    """As many numbers as there may be; then an error on one rank meets a decision of another kind on the other."""
    own = Ranks(dist.group.WORLD, torch.device("cpu"))
    out: list[Any] = [own.numbers([float(own.rank)] * width) for width in (0, 1, 7, 8, 20)]
    out += [own.largest(list, 0), own.largest(lambda: [float(own.rank)] * 20, 20)]
    for other in (
        lambda: own.numbers([0.0] * 20),
        lambda: own.largest(lambda: [0.0], 1),
        lambda: own.together(lambda: ()),
    ):
        if own.rank == 1:
            own.tell(Memory("between decisions"))
        else:
            out.append(caught(other)[0])
    return out


CHECKS = (
    steps_that_fail,
    states_that_fail,
    shards_that_fail,
    loads_that_fail,
    gradient_methods,
    matrices,
    orders,
    decisions,
)


def everything() -> dict[str, Any]:
    return {f.__name__: f() for f in CHECKS}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks(everything, 2, timeout=400)


CASES = [(name, "1.0") for name in PLACES] + [(name, "0.5") for name in PLACES | PLACES_OF_PARTS]


@pytest.mark.parametrize(("place", "fraction"), CASES)
def test_a_step_that_fails_on_one_rank_fails_on_all_and_can_be_tried_again(
    found: list[dict[str, Any]], place: str, fraction: str
) -> None:
    results = (rank["steps_that_fail"][f"{place}, {fraction}"] for rank in found)
    (one, same_before, last), (other, unchanged, last_there) = results
    assert one[0] == OtherRankFailed.__name__ and "failed on rank 1 of the group" in one[1]
    assert other[0] == Memory.__name__
    assert same_before and unchanged
    assert same(last, last_there)
    assert distance(last, alone("kfac exact", Net(), vectors(), **(PLACES | PLACES_OF_PARTS)[place][0])) < 1e-10


def test_a_state_fails_on_all(found: list[dict[str, Any]]) -> None:
    assert [rank["states_that_fail"][0] for rank in found] == [OtherRankFailed.__name__, Memory.__name__]


@pytest.mark.parametrize("place", [f"{method}, {name}" for method, some in PLACES_OF_SHARDS.items() for name in some])
def test_a_step_on_shards_fails_on_all_and_can_be_tried_again(found: list[dict[str, Any]], place: str) -> None:
    (one, last), (other, last_there) = (rank["shards_that_fail"][place] for rank in found)
    assert (one[0], other[0]) == (OtherRankFailed.__name__, Memory.__name__), (one, other)
    assert same(last, last_there)
    net = square()
    rank_steps(net, on_shards(place.split(", ")[0], net), range(4))
    assert distance(last, parameters(net)) < 1e-12


@pytest.mark.parametrize("method", ["SOAP", "SOAP, local", "KFAC"])
def test_a_state_on_shards_that_fits_one_rank_alone_is_loaded_on_none(found: list[dict[str, Any]], method: str) -> None:
    (one, fresh, equal), (other, fresh_there, equal_there) = (rank["loads_that_fail"][method] for rank in found)
    assert [kind for kind, _ in one] == [OtherRankFailed.__name__] * len(SPOILT)
    assert [kind for kind, _ in other] == [ValueError.__name__] * len(SPOILT), other
    assert fresh and fresh_there and equal and equal_there


def test_so_do_steps_of_gradient_methods(found: list[dict[str, Any]]) -> None:
    (one, same_before, last), (other, unchanged, last_there) = (rank["gradient_methods"] for rank in found)
    assert (one[0], other[0]) == (OtherRankFailed.__name__, Memory.__name__)
    assert same_before and unchanged and same(last, last_there)


def test_a_decision_of_any_width_is_met_by_an_error(found: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found):
        told = result["decisions"]
        assert told[:5] == [[[0.0] * width, [1.0] * width] for width in (0, 1, 7, 8, 20)]
        assert told[5:7] == [[], [1.0] * 20]
        assert told[7:] == ([OtherRankFailed.__name__] * 3 if rank == 0 else [])


def test_a_matrix_fails_on_all(found: list[dict[str, Any]]) -> None:
    first, second = (rank["matrices"] for rank in found)
    for name in first:
        assert first[name][0] == "ShareFailed" and "rank 1 failed" in first[name][1], name
        assert second[name][0] == Memory.__name__, name


def test_the_order_of_layers_may_differ_between_ranks(found: list[dict[str, Any]]) -> None:
    for name, values in found[0]["orders"].items():
        other = found[1]["orders"][name]
        assert values.keys() == other.keys(), name
        # Lengths of moves are added up in the order of the parameters.
        assert max(float((values[n] - other[n]).abs().max()) for n in values) < 1e-13, name


# Processes that are killed


def train_until_killed(folder: str, victim: int) -> None:
    """Checkpoints after each step; one rank is killed in the midst of the third, wherever the others are then."""
    model = Net()
    parallel = DistributedDataParallel(model)
    optimizer = make("kfac exact", parallel, memory_fraction=1 / dist.get_world_size())
    try:
        for step in range(4):
            backward(model, parallel, step, optimizer.loss_fn)
            if step == 2 and dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            state = optimizer.state_dict()
            if dist.get_rank() == 0:
                path = Path(folder) / "next"
                torch.save({"model": model.state_dict(), "optimizer": state, "step": step}, path)
                path.rename(Path(folder) / "last")
    except ProcessLost as error:
        (Path(folder) / f"lost{dist.get_rank()}").write_text(str(error))
        raise


def shards_until_killed(folder: str) -> None:
    """Rank 1 is killed before a step of sharded parameters; then every door of the other, which is left alone."""
    runs = {"SOAP": METHODS["SOAP"], "MFAC": METHODS["MFAC"], "KFAC": None}
    made: dict[str, Any] = {}
    for name, method in runs.items():
        net = shard(square(), mesh_of((2,)))
        optimizer: Any = KFAC(net, nn.MSELoss(), lr=0.1) if method is None else method(net.parameters())
        rank_steps(net, optimizer, range(1), dist.get_rank(), 2)
        x, y = batch(1)
        getattr(optimizer, "loss_fn", nn.functional.mse_loss)(net(x), y).backward()
        made[name] = optimizer
    saved = made["SOAP"].state_dict()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    doors = {name: optimizer.step for name, optimizer in made.items()}
    doors |= {f"{name}, state": made[name].state_dict for name in ("SOAP", "KFAC")}
    doors["load"] = lambda: made["SOAP"].load_state_dict(saved)
    torch.save({name: caught(door) for name, door in doors.items()}, Path(folder) / "told")
    raise ProcessLost


def share_until_killed(folder: str, victim: int) -> None:
    x, y = vectors()[0]
    H = curvature.hessian(Net(), nn.CrossEntropyLoss(), [(x[mine(16)], y[mine(16)])], process_group=dist.group.WORLD)
    try:
        for number in range(3):
            if number == 2 and dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            H @ torch.ones(H.shape[1], dtype=torch.float64)
    except ProcessLost as error:
        (Path(folder) / f"lost{dist.get_rank()}").write_text(str(error))
        raise


def test_a_killed_rank_ends_the_others_and_the_last_checkpoint_loads(tmp_path: Path) -> None:
    world, victim = 4, 3
    # Who has not ended 20 seconds after the first is killed, too, and has another exit code than 1.
    ended = outcomes(train_until_killed, world, str(tmp_path), victim, timeout=100, grace=20)
    assert ended[victim].code == -signal.SIGKILL
    for rank in range(world - 1):
        assert ended[rank].code == 1, ended[rank]
        assert "the last checkpoint" in (tmp_path / f"lost{rank}").read_text()
    saved = torch.load(tmp_path / "last", weights_only=True)
    model = Net()
    optimizer = make("kfac exact", model)
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])
    assert saved["step"] == 1
    for x, y in vectors()[2:]:
        optimizer.zero_grad()
        optimizer.loss_fn(model(x), y).backward()
        optimizer.step()
    assert distance(parameters(model), alone("kfac exact", Net(), vectors())) < 1e-10


def test_a_killed_rank_ends_the_steps_and_states_of_sharded_parameters(tmp_path: Path) -> None:
    ended = outcomes(shards_until_killed, 2, str(tmp_path), timeout=100)
    assert ended[1].code == -signal.SIGKILL and ended[0].code == 1
    told = torch.load(tmp_path / "told")
    assert {name: words for name, words in told.items() if words[0] != ProcessLost.__name__} == {}
    assert len(told) == 6 and all("rank 0 of 2 got no answer" in words for _, words in told.values())


def test_a_killed_rank_ends_products_with_a_matrix(tmp_path: Path) -> None:
    ended = outcomes(share_until_killed, 2, str(tmp_path), 0, timeout=60)
    assert ended[0].code == -signal.SIGKILL and ended[1].code == 1
    assert "rank 1 of 2 got no answer from the others" in (tmp_path / "lost1").read_text()


def silent() -> Any:
    """A rank that does not answer: the others wait as long as their group says."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    x, y = vectors()[0]
    H = curvature.hessian(Net(), nn.CrossEntropyLoss(), [(x[mine(16)], y[mine(16)])], process_group=group)
    vector = torch.ones(H.shape[1], dtype=torch.float64)
    H @ vector
    begun = time.monotonic()
    try:
        if dist.get_rank() == 0:
            H @ vector
        else:
            time.sleep(3)
    except ProcessLost as error:
        return str(error), time.monotonic() - begun, "".join(traceback.format_exception(error))
    return None


def test_the_group_says_how_long_is_waited() -> None:
    told, none = ranks(silent, 2)
    assert none is None
    words, waited, trace = told
    assert "longer than the group's timeout" in words and "timeout=datetime.timedelta" in words
    assert waited < 2.9 and "torch.distributed" in trace
