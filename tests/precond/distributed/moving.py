"""Runs that go from two ranks to four and back, teams of two among four, and gradient methods under ``join()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from precond import EKFAC, KFAC, SOAP, Muon, Shampoo
from tests.precond.distributed.checks import Net, parameters, vectors
from tests.precond.distributed.layered_runs import shard
from tests.precond.distributed.sharded_runs import whole

#: Method, made for a number of ranks; statistics and inverses are due within stages and at their borders.
MOVED: dict[str, Callable[[nn.Module, nn.Module, int], torch.optim.Optimizer]] = {
    "KFAC": lambda model, loss_fn, size: KFAC(
        model, loss_fn, lr=0.1, fisher="exact", inverse_update_period=3, memory_fraction=1 / size
    ),
    "EKFAC": lambda model, loss_fn, _: EKFAC(model, loss_fn, lr=0.1, fisher="exact", inverse_update_period=3),
    "SOAP": lambda model, _, __: SOAP(model.parameters(), lr=0.02, inverse_update_period=3),
    "Shampoo": lambda model, _, __: Shampoo(model.parameters(), lr=0.02, inverse_update_period=3, damping=1e-8),
    "Muon": lambda model, _, __: Muon(model.parameters(), lr=0.02),
}
#: Ways of saving; both where processes share the blocks, and where parameters have the state.
RUNS = [("KFAC", "plain"), ("KFAC", "dcp"), ("EKFAC", "plain"), ("SOAP", "plain"), ("SOAP", "dcp"), ("Shampoo", "dcp")]
RUNS += [("Muon", "plain")]
#: Ranks of each stage, of two steps.
STAGES = (2, 4, 2)


def steps(model: nn.Module, optimizer: Any, loss_fn: nn.Module, stage: int, rank: int = 0, size: int = 1) -> None:
    for x, y in vectors(2 * len(STAGES))[2 * stage : 2 * stage + 2]:
        mine = slice(rank * len(x) // size, (rank + 1) * len(x) // size)
        optimizer.zero_grad()
        loss_fn(model(x[mine]), y[mine]).backward()
        optimizer.step()


def uninterrupted(name: str) -> list[Tensor]:
    """The same in one process."""
    net, loss_fn = Net(), nn.CrossEntropyLoss()
    optimizer = MOVED[name](net, loss_fn, 1)
    for stage in range(len(STAGES)):
        steps(net, optimizer, loss_fn, stage)
    return parameters(net)


def save(way: str, model: nn.Module, optimizer: Any, path: str, group: Any) -> None:
    if way == "dcp":
        parts = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
        dcp.save(parts, checkpoint_id=path, process_group=group)
        return
    state = optimizer.state_dict()  # on all ranks
    if dist.get_rank() == 0:
        torch.save((model.state_dict(), state), path)


def load(way: str, model: nn.Module, optimizer: Any, path: str, group: Any) -> None:
    if way == "dcp":
        parts = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=path, process_group=group)
        set_state_dict(model, optimizer, model_state_dict=parts["m"], optim_state_dict=parts["o"])
        return
    weights, state = torch.load(path)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)


def moved(folder: str) -> dict[str, list[Tensor]]:
    """The first two ranks make a group of their own; what the run comes to with them."""
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    out: dict[str, list[Tensor]] = {}
    for name, way in RUNS:
        for stage, size in enumerate(STAGES):
            if dist.get_rank() < size:
                net, loss_fn = Net(), nn.CrossEntropyLoss()
                model = DistributedDataParallel(net, process_group=groups[size])
                optimizer = MOVED[name](model, loss_fn, size)
                if stage:
                    load(way, model, optimizer, f"{folder}/{name}-{way}-{stage - 1}", groups[size])
                steps(model, optimizer, loss_fn, stage, dist.get_rank(), size)
                save(way, model, optimizer, f"{folder}/{name}-{way}-{stage}", groups[size])
                out[f"{name}, {way}"] = parameters(net)
            dist.barrier()
    return out if dist.get_rank() < STAGES[-1] else {}


JOINED = ("SOAP", "Shampoo", "Muon")


def joined() -> dict[str, list[Tensor]]:
    """The first of four ranks has one batch more than the others, under ``DistributedDataParallel.join()``."""
    out = {}
    for name in JOINED:
        net, loss_fn = Net(), nn.CrossEntropyLoss()
        model = DistributedDataParallel(net)
        optimizer = MOVED[name](model, loss_fn, dist.get_world_size())
        with model.join():
            for x, y in vectors(3)[: 3 if dist.get_rank() == 0 else 2]:
                optimizer.zero_grad()
                mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
                loss_fn(model(x[mine]), y[mine]).backward()
                optimizer.step()
        out[name] = parameters(net)
    return out


def joined_alone(name: str) -> list[Tensor]:
    """The same in one process: whoever has no data counts among the four with a gradient of zero."""
    net, loss_fn = Net(), nn.CrossEntropyLoss()
    optimizer = MOVED[name](net, loss_fn, 1)
    for index, (x, y) in enumerate(vectors(3)):
        optimizer.zero_grad()
        loss = loss_fn(net(x), y) if index < 2 else loss_fn(net(x[:4]), y[:4]) / 4
        loss.backward()
        optimizer.step()
    return parameters(net)


def of_a_team(team: int, rank: int = 0, size: int = 1, group: Any = None, mesh: Any = None) -> list[Tensor]:
    """K-FAC on the batches of one team, with gradients averaged by hand or with a model under ``fully_shard``."""
    net, loss_fn = Net(), nn.CrossEntropyLoss()
    if mesh is not None:
        shard(net, mesh, ("first", "norm"))
    by_hand = {} if group is None else {"process_group": group, "memory_fraction": 0.5}
    optimizer = KFAC(net, loss_fn, lr=0.1, fisher="exact", **by_hand)
    for x, y in vectors(6)[3 * team : 3 * team + 3]:
        mine = slice(rank * len(x) // size, (rank + 1) * len(x) // size)
        optimizer.zero_grad()
        loss_fn(net(x[mine]), y[mine]).backward()
        for p in net.parameters() if group is not None else ():
            assert p.grad is not None
            dist.all_reduce(p.grad, group=group)
            p.grad /= size
        optimizer.step()
    return parameters(net) if mesh is None else whole(net)


def teams() -> dict[str, list[Tensor]]:
    """The first two of four ranks train one model, the others another one."""
    team, rank = divmod(dist.get_rank(), 2)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("team", "shard"))["shard"]
    return {
        f"{team}, by hand": of_a_team(team, rank, 2, group=groups[team]),
        f"{team}, shards": of_a_team(team, rank, 2, mesh=mesh),
    }
