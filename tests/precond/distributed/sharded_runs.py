"""What the ranks of the tests on sharded parameters run."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import precond
from precond import (
    KFAC,
    MFAC,
    PSGD,
    SOAP,
    AdaptiveRate,
    EMANesterov,
    GaLore,
    Hyperball,
    KLShampoo,
    Momentum,
    Muon,
    Newton,
    RadialBrake,
    Shampoo,
    SOAPMuon,
    SPlus,
    UpdateFloor,
    Vectors,
    WeightDecay,
)
from precond.distributed import exchange, shard_messages
from precond.distributed.ranks import OtherRankFailed
from precond.distributed.sharded import local
from solvers import SolverError

#: Every method that needs gradients alone, with options under which short runs meet each of their parts.
METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SOAP": lambda p: SOAP(p, lr=0.02, inverse_update_period=2, weight_decay=0.1, adaptive_rate=AdaptiveRate()),
    "SOAP with momentum": lambda p: SOAP(p, lr=0.02, inverse_update_period=2, momentum=0.9),
    "Shampoo": lambda p: Shampoo(p, lr=0.02, inverse_update_period=2, block_size=3, damping=1e-8),
    "Shampoo corrected": lambda p: Shampoo(p, lr=0.02, inverse_update_period=2, eigenvalue_correction=True),
    "KLShampoo": lambda p: KLShampoo(p, lr=0.02, inverse_update_period=2),
    "SPlus": lambda p: SPlus(p, lr=0.02, inverse_update_period=2, weight_decay=WeightDecay(0.1, "cautious")),
    "Muon": lambda p: Muon(p, lr=0.02, weight_decay=WeightDecay(0.1, "l2"), kl_clip=1e-2),
    "Muon controlled": lambda p: Muon(
        p,
        lr=0.02,
        norm_control=(RadialBrake(0.5), UpdateFloor(5.0, rows=True), Hyperball()),
        lookahead=EMANesterov(2.0, 0.5),
        row_normalization=0.5,
        vectors=Vectors((0.9, 0.99), 2.0),
    ),
    "SOAPMuon": lambda p: SOAPMuon(p, lr=0.02, inverse_update_period=2),
    "PSGD": lambda p: PSGD(p, lr=0.02, momentum=Momentum(0.9, nesterov=True)),
    "GaLore": lambda p: GaLore(p, lr=0.02, rank=2, inverse_update_period=2),
    "MFAC": lambda p: MFAC(p, lr=0.02, window=3, damping=0.1),
}


def seeded(net: nn.Sequential) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return net


def rich() -> nn.Sequential:
    """Tensors of many shapes; few rows, so that shards are uneven and some of them empty."""
    return seeded(
        nn.Sequential(
            nn.Unflatten(1, (1, 4)),
            nn.Conv1d(1, 3, 2, padding=1),
            nn.Flatten(),
            nn.Linear(15, 5, bias=False),
            nn.Tanh(),
            nn.Linear(5, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Tanh(),
            nn.Linear(4, 1),
        )
    )


def square() -> nn.Sequential:
    """Square matrices."""
    return seeded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    return x, x.sin()


def share(x: Tensor, rank: int, size: int) -> Tensor:
    return x[rank * len(x) // size : (rank + 1) * len(x) // size]


def shard(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """One layer in a group of its own, the others with the root."""
    fully_shard(next(layer for layer in net if isinstance(layer, nn.Linear)), mesh=mesh)
    return fully_shard(net, mesh=mesh)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, which: range, rank: int = 0, size: int = 1) -> None:
    for step in which:
        x, y = (share(t, rank, size) for t in batch(step))
        optimizer.zero_grad()
        out = net(x)
        nn.functional.mse_loss(out, y[:, : out.shape[1]]).backward()
        optimizer.step()


def whole(net: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in net.parameters()]


def gap(first: nn.Module, second: nn.Module) -> float:
    return apart(whole(first), whole(second))


def apart(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def differences(shape: tuple[int, ...], names: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Distances between sharded runs and one process: where all see the same data, and where each has its share."""
    mesh, rank, size = mesh_of(shape), dist.get_rank(), dist.get_world_size()
    out = {}
    for name in names or METHODS:
        alone, gaps = rich(), []
        steps(alone, METHODS[name](alone.parameters()), range(6))
        for place in ((0, 1), (rank, size)):
            net = shard(rich(), mesh)
            steps(net, METHODS[name](net.parameters()), range(6), *place)
            gaps.append(gap(alone, net))
        out[name] = (gaps[0], gaps[1])
    return out


# Checks on the ranks


def refusals(shape: tuple[int, ...]) -> dict[str, str]:
    """What every kind of parameter and method that is not served is told, on two ranks."""
    mesh, told = mesh_of(shape), {}

    def tell(name: str, make: Callable[[], Any]) -> None:
        try:
            make()
            told[name] = ""
        except (NotImplementedError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    net = shard(square(), mesh)
    tell("closure", lambda: Newton(net.parameters()))
    tell("hessian", lambda: PSGD(net.parameters(), criterion="hessian"))
    twice = init_device_mesh("cpu", (2, 1), mesh_dim_names=("rows", "columns"))
    cut = nn.Parameter(distribute_tensor(torch.ones(4, 4), twice, [Shard(0), Shard(1)]))
    tell("twice", lambda: SOAP([cut]))
    flat = nn.Parameter(torch.ones(4))
    flat._fsdp_flattened = True  # type: ignore[attr-defined]  # as FullyShardedDataParallel marks its own
    tell("flat", lambda: SOAP([flat]))
    for name, method in {"SOAP": SOAP, "Muon": Muon, "KFAC": KFAC}.items():
        net = square()
        optimizer = KFAC(net, nn.MSELoss(), lr=0.1) if method is KFAC else method(net.parameters())
        shard(net, mesh)
        tell(f"{name} before", lambda net=net, optimizer=optimizer: steps(net, optimizer, range(1)))
    net = square()
    optimizer = SOAP(net.parameters())
    fully_shard(net[2], mesh=mesh)  # a part of the model
    tell("part before", lambda: steps(net, optimizer, range(1)))
    return told


def failure_on_one(optimizer: Any, step: Callable[[], None]) -> str:
    """What this rank is told of a step whose directions fail on rank 1 alone."""
    works = optimizer.whole_directions

    def fails(gradients: Any) -> Any:
        works(gradients)
        if dist.get_rank() == 1:
            raise SolverError("the factors are broken")
        return works(gradients)

    optimizer.whole_directions = fails
    try:
        step()
    except (SolverError, OtherRankFailed) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del optimizer.whole_directions
    return "nothing"


def disagreements(shape: tuple[int, ...]) -> dict[str, Any]:
    """What a number that is not finite, and a failure, of one rank do to all: nothing moves anywhere."""
    mesh, rank, out = mesh_of(shape), dist.get_rank(), {}
    for name in ("SOAP", "Muon", "MFAC"):
        net = shard(square(), mesh)
        optimizer: Any = METHODS[name](net.parameters())
        steps(net, optimizer, range(2))
        before = [p.clone() for p in whole(net)]
        nn.functional.mse_loss(net(batch(2)[0]), batch(2)[1]).backward()
        if rank == 0:
            next(p for p in net.parameters() if p.to_local().numel()).grad.to_local().fill_(math.inf)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, whole(net), strict=True))
        out[name] = (optimizer.skipped, same, len(caught))
    net, alone = shard(rich(), mesh), rich()
    soap, single = (METHODS["SOAP"](model.parameters()) for model in (net, alone))
    steps(net, soap, range(2))
    out["failure"] = failure_on_one(soap, lambda: steps(net, soap, range(2, 3)))
    out["steps"] = soap.steps
    steps(net, soap, range(2, 5))
    steps(alone, single, range(5))
    out["afterwards"] = gap(net, alone)
    return out


def traffic(shape: tuple[int, ...]) -> dict[str, Any]:
    """Messages, bytes to and from others, and what is kept; by measurement, and as it was planned."""
    mesh, out, rank = mesh_of(shape), {}, dist.get_rank()
    original = dist.all_to_all_single
    for name in ("SOAP with momentum", "Shampoo", "SPlus", "Muon"):
        sent: list[tuple[int, int]] = []

        def counting(got: Tensor, given: Tensor, into: list[int], of: list[int], sent: Any = sent, **more: Any) -> Any:
            sent.append(((sum(of) - of[rank]) * given.itemsize, (sum(into) - into[rank]) * got.itemsize))
            return original(got, given, into, of, **more)

        net, alone = shard(rich(), mesh), rich()
        optimizer, single = (METHODS[name](model.parameters()) for model in (net, alone))
        steps(net, optimizer, range(1))
        steps(alone, single, range(1))
        dist.all_to_all_single = counting
        try:
            steps(net, optimizer, range(1, 2))
        finally:
            dist.all_to_all_single = original
        found = precond.plan(rich(), world_size=shape[0], optimizer=METHODS[name])
        out[name] = {
            "messages": len(sent),
            "measured": (*map(sum, zip(*sent, strict=True)), kept(optimizer)),
            "planned": (found.sent[rank], found.received[rank], found.state[rank]),
            "alone": kept(single),
            "all planned": sum(found.state),
        }
    return out


def buckets(shape: tuple[int, ...]) -> dict[str, Any]:
    """Runs with as many buckets as there are kinds of parameters: the distance to one of one bucket, and the order."""
    out: dict[str, Any] = {}
    for name in ("SOAP", "KFAC"):
        nets = [shard(rich(), mesh_of(shape)) for _ in range(2)]
        makes: Any = METHODS.get(name) or (lambda params: None)
        made = [
            makes(net.parameters()) or KFAC(net, nn.MSELoss(), lr=0.1, fisher="exact", kl_clip=None) for net in nets
        ]
        steps(nets[0], made[0], range(3))
        usual, exchange.BUCKET = exchange.BUCKET, 0
        try:
            steps(nets[1], made[1], range(2))
            with recorded(made[1]) as events:
                steps(nets[1], made[1], range(2, 3))
        finally:
            exchange.BUCKET = usual
        out[name] = gap(*nets), events
    return out


@contextlib.contextmanager
def recorded(optimizer: Any) -> Iterator[list[tuple[str, int]]]:
    """When messages to and from owners begin, when they are waited for, and when directions are computed."""
    message, events, known = shard_messages.Message, list[tuple[str, int]](), list[Any]()
    layered = hasattr(optimizer, "preconditioners")
    owner, compute = (optimizer.preconditioners, "apply") if layered else (optimizer, "whole_directions")
    own, begin, wait = getattr(owner, compute), message.begin, message.wait

    def computes(*args: Any, **kwargs: Any) -> Any:
        events.append(("compute", -1))
        return own(*args, **kwargs)

    def note(kind: str, function: Any) -> Any:
        def call(self: Any) -> None:
            if not any(self is one for one in known):
                known.append(self)
            events.append((kind, next(i for i, one in enumerate(known) if self is one)))
            function(self)

        return call

    setattr(owner, compute, computes)
    message.begin, message.wait = note("begin", begin), note("wait", wait)  # type: ignore[method-assign]
    try:
        yield events
    finally:
        message.begin, message.wait = begin, wait  # type: ignore[method-assign]
        delattr(owner, compute)


def alike_meshes(shape: tuple[int, ...]) -> dict[str, float]:
    """Two meshes of the same ranks, as a mesh that is made twice: distances to one process."""
    first, second = (
        mesh_of(shape),
        DeviceMesh.from_group(dist.new_group(list(range(shape[0]))), "cpu", mesh_dim_names=("shard",)),
    )
    out: dict[str, float] = {}
    methods: dict[str, Callable[[nn.Module], Any]] = {
        "SOAP bounded": lambda net: SOAP(net.parameters(), lr=0.5, kl_clip=1e-3),
        "Muon": lambda net: METHODS["Muon"](net.parameters()),
        "Muon controlled": lambda net: METHODS["Muon controlled"](net.parameters()),
        "KFAC": lambda net: KFAC(
            net, nn.MSELoss(), lr=0.1, fisher="exact", process_group=None if isinstance(net, FSDPModule) else alone_here
        ),
    }
    alone_here = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for name, make in methods.items():
        alone, net = rich(), rich()
        fully_shard(next(layer for layer in net if isinstance(layer, nn.Linear)), mesh=first)
        fully_shard(net, mesh=second)
        single, several = make(alone), make(net)
        single.metrics(), several.metrics()  # the lengths of moves are measured from now on
        steps(alone, single, range(4))
        steps(net, several, range(4), dist.get_rank(), dist.get_world_size())
        out[name] = gap(alone, net)
        if name == "KFAC":
            out["step norm"] = abs(single.metrics()["step_norm"] - several.metrics()["step_norm"])
    return out


def kept(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that lie in this process, without what a step adds by the way: lengths and radii."""
    entries = [entry for own in optimizer.state.values() for entry in own.items()]
    parts = [local(x) for name, x in entries if isinstance(x, Tensor) and (x.ndim or name == "rate")]
    return sum(x.numel() * x.itemsize for x in parts)


def tensor_parallel(shape: tuple[int, ...]) -> dict[str, float]:
    """Columns of one layer, rows of the next, and a norm that every rank has."""
    mesh, out = init_device_mesh("cpu", shape), {}
    for name in ("Shampoo", "Muon", "SPlus", "MFAC", "KLShampoo"):
        nets = [seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4))) for _ in range(2)]
        parallelize_module(nets[0], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for net in nets:
            steps(net, METHODS[name](net.parameters()), range(4))
        out[name] = gap(*nets)
    return out


#: One of each kind: matrices and moments of an owner, averages and windows cut as the parameter is, inner optimizers.
SAVED = ("SOAP", "Shampoo corrected", "Muon", "SPlus", "MFAC", "GaLore", "Muon controlled")


def saves(shape: tuple[int, ...], folder: str) -> None:
    """Four steps, on the same data everywhere, and a checkpoint: flat of some methods, nested of the others."""
    for number, name in enumerate(SAVED):
        net = shard(rich(), mesh_of(shape)) if shape else rich()
        optimizer = METHODS[name](net.parameters())
        steps(net, optimizer, range(4))
        optimizer.zero_grad()
        options = StateDictOptions(flatten_optimizer_state_dict=number % 2 == 0)
        parts = dict(zip("mo", get_state_dict(net, optimizer, options=options), strict=True))
        dcp.save(parts, checkpoint_id=f"{folder}/{name}")


def loads(shape: tuple[int, ...], folder: str) -> dict[str, float]:
    """A fresh model and optimizer go on from there: the distance to one process that was never interrupted."""
    out = {}
    for number, name in enumerate(SAVED):
        alone, net = rich(), shard(rich(), mesh_of(shape)) if shape else rich()
        steps(alone, METHODS[name](alone.parameters()), range(7))
        optimizer = METHODS[name](net.parameters())
        options = StateDictOptions(flatten_optimizer_state_dict=number % 2 == 0)
        parts = dict(zip("mo", get_state_dict(net, optimizer, options=options), strict=True))
        dcp.load(parts, checkpoint_id=f"{folder}/{name}")
        set_state_dict(net, optimizer, model_state_dict=parts["m"], optim_state_dict=parts["o"], options=options)
        steps(net, optimizer, range(4, 7))
        out[name] = gap(net, alone)
    return out


def plain_states(shape: tuple[int, ...]) -> dict[str, float]:
    """``state_dict`` and ``load_state_dict`` by themselves, and the full state on one rank, sent to all by torch."""
    out, full = {}, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in ("SPlus", "Muon"):
        alone, (first, second, third) = rich(), (shard(rich(), mesh_of(shape)) for _ in range(3))
        optimizers = [METHODS[name](net.parameters()) for net in (first, second, third)]
        steps(first, optimizers[0], range(4))
        second.load_state_dict(first.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # as a snapshot in memory
        optimizers[0].zero_grad()
        third.load_state_dict(first.state_dict())
        whole_state = get_optimizer_state_dict(first, optimizers[0], options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(third, optimizers[2], whole_state if dist.get_rank() == 0 else {}, options=full)
        steps(alone, METHODS[name](alone.parameters()), range(7))
        steps(second, optimizers[1], range(4, 7))
        steps(third, optimizers[2], range(4, 7))
        out[name], out[f"{name} full"] = gap(second, alone), gap(third, alone)
    return out


def other_ways(shape: tuple[int, ...]) -> dict[str, float]:
    """Halves of steps, averages of iterates, groups added later: distances to one process, on the same data."""
    mesh, out = mesh_of(shape), {}
    for name, run in {"halves": halves, "averages": averages, "groups": groups}.items():
        net, alone = shard(rich(), mesh), rich()
        out[name] = gap_under(run(net), net, run(alone), alone)
    return out


def halves(net: nn.Module) -> Any:
    """Preconditioned gradients under another optimizer, and then under the own second half."""
    first, second = METHODS["SOAP"](net.parameters()), torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(4):
        x, y = batch(step)
        first.zero_grad()
        nn.functional.mse_loss(net(x), y[:, :1]).backward()
        first.precondition()  # type: ignore[attr-defined]
        (second if step < 2 else first).step()
    return contextlib.nullcontext


def averages(net: nn.Module) -> Any:
    optimizer: Any = METHODS["SPlus"](net.parameters())
    steps(net, optimizer, range(3))
    return optimizer.averaged


def groups(net: nn.Module) -> Any:
    params = list(net.parameters())
    optimizer = SOAP(params[:4], lr=torch.tensor(0.01), maximize=True, momentum=0.5)
    steps(net, optimizer, range(2))
    optimizer.add_param_group({"params": params[4:]})
    steps(net, optimizer, range(2, 4))
    return contextlib.nullcontext


def gap_under(first: Any, net: nn.Module, second: Any, alone: nn.Module) -> float:
    with first(), second():
        return gap(net, alone)


def replicated(folder: str) -> dict[str, tuple[float, float]]:
    """DistributedDataParallel: a run that goes on, beside one from a checkpoint and one from a plain state."""
    out = {}
    for name in ("SOAP", "MFAC"):
        nets = [nn.parallel.DistributedDataParallel(rich()) for _ in range(3)]
        optimizers = [METHODS[name](net.parameters()) for net in nets]
        steps(nets[0], optimizers[0], range(4), dist.get_rank(), dist.get_world_size())
        optimizers[0].zero_grad()
        nets[2].load_state_dict(nets[0].state_dict())
        optimizers[2].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        dcp.save(dict(zip("mo", get_state_dict(nets[0], optimizers[0]), strict=True)), checkpoint_id=folder + name)
        parts = dict(zip("mo", get_state_dict(nets[1], optimizers[1]), strict=True))
        dcp.load(parts, checkpoint_id=folder + name)
        set_state_dict(nets[1], optimizers[1], model_state_dict=parts["m"], optim_state_dict=parts["o"])
        for net, optimizer in zip(nets, optimizers, strict=True):
            steps(net, optimizer, range(4, 7), dist.get_rank(), dist.get_world_size())
        out[name] = (gap(nets[0], nets[1]), gap(nets[0], nets[2]))
    return out


# One launch each: a process takes seconds to begin


def on_four(folder: str) -> dict[str, Any]:
    saves((2, 2), folder)
    few = ["PSGD", "MFAC"]
    return {"hybrid": differences((2, 2)), "one axis": differences((4,), few)}


def on_two(folder: str) -> dict[str, Any]:
    checks = (
        differences,
        refusals,
        disagreements,
        traffic,
        tensor_parallel,
        plain_states,
        other_ways,
        buckets,
        alike_meshes,
    )
    found = {"loads": loads((2,), folder), "replicated": replicated(f"{folder}/replicated")}
    return {**found, **{check.__name__: check((2,)) for check in checks}}
