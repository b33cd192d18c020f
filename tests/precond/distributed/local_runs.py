"""What the ranks of the tests of ``shards="local"`` run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import precond
from precond import Hyperball, Tables, Vectors
from precond.distributed.sharded import local
from tests.precond.distributed.sharded_runs import (
    METHODS,
    apart,
    failure_on_one,
    gap,
    kept,
    mesh_of,
    rich,
    seeded,
    shard,
    steps,
    whole,
)

#: Those that keep matrices of parameters, without control of the norms of whole ones; and options that look at shapes.
MAKES: dict[str, Callable[..., Any]] = {
    **{name: make for name, make in METHODS.items() if name not in ("MFAC", "Muon controlled")},
    "SOAP of kinds": lambda p: precond.SOAP(
        p, lr=0.02, cautious=True, row_normalization=0.5, vectors=Vectors((0.9, 0.99), 2.0), tables=Tables(0.5, 0.01)
    ),
}


class InBlocks(nn.Module):
    """A net whose parameters are cut into blocks, each a parameter of its own.

    Args:
        net: The net.
        size: Number of blocks.
        axes: The axis that is cut, where it is not the first, by name; ``None`` for none.
    """

    def __init__(self, net: nn.Module, size: int, axes: dict[str, int | None] | None = None) -> None:
        super().__init__()
        self.net = (net,)  # its own parameters are not trained
        self.axes = {name: (axes or {}).get(name, 0) for name, _ in net.named_parameters()}
        values = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.blocks = nn.ModuleList(
            nn.ParameterList([values[name]] if axis is None else [x.clone() for x in values[name].chunk(size, axis)])
            for name, axis in self.axes.items()
        )

    def joined(self) -> dict[str, Tensor]:
        pairs = zip(self.axes.items(), self.blocks, strict=True)
        return {name: torch.cat(list(parts), axis or 0) for (name, axis), parts in pairs}

    def wholes(self) -> list[Tensor]:
        return [p.detach() for p in self.joined().values()]

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.net[0], self.joined(), x)


def locally(name: str, net: nn.Module) -> Any:
    """A method, on the rows of each process."""
    return {**METHODS, **MAKES}[name]([{"params": list(net.parameters()), "shards": "local"}])


def differences(shape: tuple[int, ...], names: list[str]) -> dict[str, tuple[float, float]]:
    """Distances to one process that has the blocks: where all see the same data, and where each has its share."""
    mesh, rank, size = mesh_of(shape), dist.get_rank(), dist.get_world_size()
    out = {}
    for name in names:
        alone, gaps = InBlocks(rich(), shape[-1]), []
        steps(alone, MAKES[name](alone.parameters()), range(4))
        for place in ((0, 1), (rank, size)):
            net = shard(rich(), mesh)
            steps(net, locally(name, net), range(4), *place)
            gaps.append(apart(alone.wholes(), whole(net)))
        out[name] = (gaps[0], gaps[1])
    return out


def tensor_parallel(shape: tuple[int, ...]) -> dict[str, float]:
    """Columns of one layer, rows of the next, and a norm that every rank has."""
    mesh, out = init_device_mesh("cpu", shape), {}
    axes = {"2.weight": 1, "2.bias": None, "3.weight": None, "3.bias": None}
    for name in ("Shampoo", "Muon"):
        net, other = (seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4))) for _ in "ab")
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        alone = InBlocks(other, shape[0], axes)
        steps(net, locally(name, net), range(4))
        steps(alone, METHODS[name](alone.parameters()), range(4))
        out[name] = apart(alone.wholes(), whole(net))
    return out


def whole_norms(shape: tuple[int, ...]) -> tuple[float, float]:
    """Under ``Hyperball``: how far the norms of whole matrices move, and those of the blocks."""
    net = shard(rich(), mesh_of(shape))
    first = norms(matrices(net)), norms(local(p.detach()) for p in net.parameters())
    steps(net, precond.Muon(net.parameters(), lr=0.02, norm_control=Hyperball(), shards="local"), range(3))
    last = norms(matrices(net)), norms(local(p.detach()) for p in net.parameters())
    wholes, parts = (float((a - b).abs().max()) for a, b in zip(first, last, strict=True))
    return wholes, parts


def norms(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.norm() for x in tensors])


def matrices(net: nn.Module) -> list[Tensor]:
    """Those with two axes longer than one."""
    return [p for p in whole(net) if p.numel() > max(p.shape)]


def traffic(shape: tuple[int, ...]) -> dict[str, Any]:
    """Messages of tensors in a step, and what is kept, measured and planned."""
    mesh, out, rank = mesh_of(shape), {}, dist.get_rank()
    original = dist.all_to_all_single
    for name in ("SOAP with momentum", "Shampoo", "SPlus", "Muon"):
        sent: list[int] = []
        net = shard(rich(), mesh)
        optimizer = locally(name, net)
        dist.all_to_all_single = lambda *_, sent=sent, **__: sent.append(1)
        try:
            steps(net, optimizer, range(2))
        finally:
            dist.all_to_all_single = original
        found = precond.plan(
            rich(),
            world_size=shape[0],
            optimizer=lambda p, name=name: METHODS[name]([{"params": p, "shards": "local"}]),
        )
        planned = (found.sent[rank], found.received[rank], found.state[rank], found.owners)
        out[name] = (len(sent), len(sent), kept(optimizer), {}), planned
    return out


#: What is saved: tables of matrices and moments, counts of blocks, averages cut as parameters, inner optimizers, norms.
SAVED = ("SOAP", "PSGD", "SPlus", "GaLore", "Muon controlled")


def saves(shape: tuple[int, ...], folder: str) -> None:
    """Three steps, and a checkpoint."""
    for number, name in enumerate(SAVED):
        net = shard(rich(), mesh_of(shape))
        optimizer = locally(name, net)
        steps(net, optimizer, range(3))
        optimizer.zero_grad()
        dcp.save(parts_of(number, net, optimizer), checkpoint_id=f"{folder}/{name}")


def parts_of(number: int, net: nn.Module, optimizer: Any) -> dict[str, Any]:
    return dict(zip("mo", get_state_dict(net, optimizer, options=options_of(number)), strict=True))


def options_of(number: int) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=number % 2 == 0)


def loads(shape: tuple[int, ...], folder: str) -> dict[str, float]:
    """A fresh model and optimizer go on from there, on as many shards: the distance to a run without interruption."""
    out = {}
    for number, name in enumerate(SAVED):
        net, other = (shard(rich(), mesh_of(shape)) for _ in range(2))
        steps(other, locally(name, other), range(6))
        optimizer = locally(name, net)
        parts = parts_of(number, net, optimizer)
        dcp.load(parts, checkpoint_id=f"{folder}/{name}")
        set_state_dict(
            net, optimizer, model_state_dict=parts["m"], optim_state_dict=parts["o"], options=options_of(number)
        )
        steps(net, optimizer, range(3, 6))
        out[name] = gap(net, other)
        if name not in ("PSGD", "SPlus"):
            continue
        first, second = (shard(rich(), mesh_of(shape)) for _ in range(2))
        optimizers = [locally(name, model) for model in (first, second)]
        steps(first, optimizers[0], range(3))
        second.load_state_dict(first.state_dict())
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        steps(second, optimizers[1], range(3, 6))
        out[f"{name}, plain"] = gap(second, other)
    return out


def refusals(shape: tuple[int, ...], folder: str) -> dict[str, str]:
    """States of other blocks, and methods that have none."""
    mesh, told = mesh_of(shape), {}

    def tell(name: str, make: Callable[[], Any]) -> None:
        try:
            make()
            told[name] = ""
        except (ValueError, TypeError) as error:
            told[name] = str(error)

    net, same, alone = shard(rich(), mesh), shard(rich(), mesh), rich()
    optimizer = locally("SOAP", net)
    steps(net, optimizer, range(2))
    state = optimizer.state_dict()
    tell("one process", lambda: locally("SOAP", alone).load_state_dict(state))
    tell("lossless", lambda: METHODS["SOAP"](same.parameters()).load_state_dict(state))
    single = locally("SOAP", alone)
    steps(alone, single, range(2))
    tell("whole", lambda: locally("SOAP", same).load_state_dict(single.state_dict()))
    tell("four", lambda: locally("SOAP", same).load_state_dict(torch.load(f"{folder}/four", weights_only=False)))
    tell("word", lambda: precond.SOAP(same.parameters(), shards="rows"))  # type: ignore[arg-type]
    tell("hessian", lambda: precond.PSGD(alone.parameters(), criterion="hessian", shards="local"))
    for closure in (precond.AdaHessian, precond.Sophia):
        tell(closure.__name__, lambda make=closure: make(alone.parameters(), shards="local"))  # type: ignore[misc]
    tell("unmoved", lambda: locally("SOAP", same).load_state_dict(precond.SOAP(same.parameters()).state_dict()))
    tell("layers", lambda: precond.KFAC(alone, nn.MSELoss(), lr=0.1, shards="local"))  # type: ignore[call-arg]
    tell("window", lambda: precond.MFAC(alone.parameters(), shards="local"))  # type: ignore[call-arg]
    return told


def disagreements(shape: tuple[int, ...]) -> dict[str, Any]:
    """What a number that is not finite, and a failure, of one rank do to all."""
    mesh, rank = mesh_of(shape), dist.get_rank()
    net, other = shard(rich(), mesh), shard(rich(), mesh)
    optimizer, undisturbed = locally("SOAP", net), locally("SOAP", other)
    steps(net, optimizer, range(2))
    before = [p.clone() for p in whole(net)]
    if rank == 0:
        next(iter(net.parameters())).grad.to_local().fill_(math.nan)  # type: ignore[union-attr]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    out: dict[str, Any] = {"skipped": (optimizer.skipped, apart(before, whole(net)), len(caught))}
    out["failure"] = failure_on_one(optimizer, lambda: steps(net, optimizer, range(2, 3)))
    out["moved"] = apart(before, whole(net))
    steps(net, optimizer, range(2, 5))
    steps(other, undisturbed, range(5))
    out["afterwards"] = gap(net, other)
    return out


def alike(net: nn.Module) -> bool:
    """Whether what this rank holds is, bit for bit, what the other replica holds."""
    parts = torch.cat([local(p).detach().reshape(-1) for p in net.parameters()])
    found = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(found, parts)
    return torch.equal(found[dist.get_rank()], found[(dist.get_rank() + 2) % 4])


def replicas(shape: tuple[int, ...]) -> bool:
    """HSDP, with shares of the data."""
    net = shard(rich(), mesh_of(shape))
    steps(net, locally("SOAP", net), range(4), dist.get_rank(), dist.get_world_size())
    return alike(net)


def several_meshes() -> list[str]:
    """Experts on two ranks each, the rest on all: refused together and as a group that is added; apart they train."""
    all_ranks, pair = mesh_of((4,)), mesh_of((2, 2))["shard"]
    net = rich()
    for layer in net[3:6]:
        fully_shard(layer, mesh=pair)
    fully_shard(net, mesh=all_ranks)
    experts = [p for p in net.parameters() if p.device_mesh.size() == 2]  # type: ignore[attr-defined]
    others = [p for p in net.parameters() if p.device_mesh.size() == 4]  # type: ignore[attr-defined]
    told = []
    first, second = precond.SOAP(experts), precond.SOAP(others)
    for make in (lambda: precond.SOAP(net.parameters()), lambda: first.add_param_group({"params": others})):
        try:
            make()
        except NotImplementedError as error:
            told.append(str(error))
    before = whole(net)
    nn.functional.mse_loss(net(torch.ones(2, 4, dtype=torch.float64)), torch.ones(2, 1, dtype=torch.float64)).backward()
    first.step(), second.step()
    return [*told, str(len(first.param_groups)), str(apart(before, whole(net)) > 0)]


def on_four(folder: str) -> dict[str, Any]:
    net = shard(rich(), mesh_of((4,)))
    optimizer = locally("SOAP", net)
    steps(net, optimizer, range(2))
    state = optimizer.state_dict()
    full = {
        key: {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in own.items()}
        for key, own in state["state"].items()
    }
    if dist.get_rank() == 0:
        torch.save({**state, "state": full}, f"{folder}/four")
    saves((2, 2), folder)
    return {
        "one axis": differences((4,), ["SOAP", "SPlus", "PSGD"]),
        "hybrid": differences((2, 2), ["SOAP"]),
        "replicas": replicas((2, 2)),
        "meshes": several_meshes(),
    }


def on_two(folder: str) -> dict[str, Any]:
    return {
        "differences": differences((2,), list(MAKES)),
        "tensor parallel": tensor_parallel((2,)),
        "norms": whole_norms((2,)),
        "traffic": traffic((2,)),
        "loads": loads((2,), folder),
        "refusals": refusals((2,), folder),
        "disagreements": disagreements((2,)),
    }
