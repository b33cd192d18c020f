"""How far the steps of several processes are from those of one: ``python -m tests.benchmarks.world_sizes``.

Prints the table of ``docs/how-to/distributed.md``: every method that runs in several processes, by how they share the
model. Four steps of three models in float64: an MLP with a norm and a bare parameter, a CNN with groups, and a
transformer whose head is tied to the embedding and whose targets are padded. A number is the largest difference of a
parameter over the largest move of one, of the worst model. The last column, of the worst way, is that of a fourth model
without directions in which gradients vanish but for rounding errors, as those of logits do, which add up to zero: the
MLP with real targets and squared errors, in batches of more rows than its layers are wide.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import precond
from tests.distributed_run import ranks
from tests.precond.distributed.checks import Batch, Conv, Net, images, mine, parameters, tokens, vectors
from tests.precond.distributed.loops import Padded

#: What every method is given beside the learning rate, where it has such an option.
OPTIONS: dict[str, Any] = {"fisher": "exact", "inverse_update_period": 2}


def made(name: str, **more: Any) -> Callable[..., Any]:
    """Makes an optimizer of a model and a loss."""
    cls = getattr(precond, name)
    known = inspect.signature(cls).parameters
    own = {key: value for key, value in OPTIONS.items() if key in known} | {"lr": 0.02} | more
    if "loss_fn" in known:
        return lambda model, loss_fn: cls(model, loss_fn, **own)
    return lambda model, loss_fn: cls(model.parameters(), **own)


#: They keep the rows of one batch, and are refused.
REFUSED = ("SENG", "SMWNaturalGradient")
#: Every method but those, and those with a closure; and options that weigh rounding errors otherwise.
METHODS: dict[str, Callable[..., Any]] = {
    **{m.name: made(m.name) for m in precond.methods() if m.needs != "closure" and m.name not in REFUSED},
    "SOAP(eps=1e-5)": made("SOAP", eps=1e-5),
    "Shampoo(damping=1e-8)": made("Shampoo", damping=1e-8),
    "Shampoo(eigenvalue_correction=True)": made("Shampoo", eigenvalue_correction=True),
}


class Tied(Padded):
    """``fully_shard`` warns of results that are views."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone()


def real() -> list[Batch]:
    """Real targets."""
    torch.manual_seed(2)
    return [(x, torch.randn(len(x), 3, dtype=x.dtype)) for x, _ in vectors()]


#: Model, its data, layers in groups of their own.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Batch]], tuple[str, ...]]] = {
    "mlp": (Net, vectors, ("first",)),
    "cnn": (Conv, images, ("one",)),
    "transformer": (Tied, tokens, ("layer",)),
    "regression": (Net, real, ("first",)),
}
#: The model of the last column.
FULL_RANK = "regression"
#: Shape of the mesh of ``fully_shard``; none for DistributedDataParallel.
WAYS: dict[str, tuple[int, tuple[int, ...]]] = {
    "DDP 2": (2, ()),
    "DDP 4": (4, ()),
    "FSDP 2": (2, (2,)),
    "FSDP 4": (4, (4,)),
    "HSDP 2x2": (4, (2, 2)),
}


@cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """All ranks as a mesh, made once: that takes a second."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def run(method: str, model: str, shape: tuple[int, ...] = ()) -> list[Tensor]:
    """Four steps on this rank's share of the data; on all of them in one process."""
    build, data, layers = MODELS[model]
    net = build()
    call: Any = net
    if shape:
        mesh = mesh_of(shape)
        for name in layers:
            fully_shard(net.get_submodule(name), mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif dist.is_initialized():
        call = DistributedDataParallel(net)
    loss_fn = nn.MSELoss() if model == FULL_RANK else nn.CrossEntropyLoss()
    optimizer = METHODS[method](call, loss_fn)
    size = dist.get_world_size() if dist.is_initialized() else 1
    for x, y in data():
        part = mine(len(x))
        optimizer.zero_grad()
        target, counted = (y[part], y[part] < math.inf) if y.is_floating_point() else (y[part].flatten(), y[part] >= 0)
        share = int(counted.sum()) / int((y > -100).sum()) * size  # padding is -100, and ranks differ in it
        (share * getattr(optimizer, "loss_fn", loss_fn)(call(x[part]), target)).backward()
        optimizer.step()
    return [p.full_tensor().detach() if shape else p.detach() for p in net.parameters()]  # type: ignore[operator]


def all_runs(ways: list[str], methods: list[str], models: list[str]) -> dict[str, Any]:
    """What a rank ends with, or what it is told."""
    out: dict[str, Any] = {}
    for way in ways:
        for method in methods:
            for model in models:
                try:
                    out[f"{way}; {method}; {model}"] = run(method, model, WAYS[way][1])
                except NotImplementedError as error:
                    out[f"{way}; {method}; {model}"] = f"refused: {error}"
    return out


def deviations(methods: list[str], ways: list[str], models: list[str]) -> dict[str, dict[str, float | str]]:
    """By method and way: the deviation, or what it is told."""
    found: dict[str, list[Any]] = {}
    for size in sorted({WAYS[way][0] for way in ways}):
        results = ranks(all_runs, size, [way for way in ways if WAYS[way][0] == size], methods, models, timeout=1000)
        found |= {key: [result[key] for result in results] for key in results[0]}
    table: dict[str, dict[str, float | str]] = {method: {} for method in methods}
    for method in methods:
        for model in models:
            first, alone = parameters(MODELS[model][0]()), run(method, model)
            moved = max(float((a - b).abs().max()) for a, b in zip(alone, first, strict=True))
            for way in ways:
                values = found[f"{way}; {method}; {model}"]
                if isinstance(values[0], str):
                    table[method][way] = values[0]
                    continue
                assert all(torch.equal(a, b) for v in values for a, b in zip(v, values[0], strict=True)), (way, method)
                gap = max(float((a - b).abs().max()) for a, b in zip(values[0], alone, strict=True)) / moved
                table[method][way] = max(float(table[method].get(way, 0.0)), gap)
    return table


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = deviations(list(METHODS), list(WAYS), [name for name in MODELS if name != FULL_RANK])
    full = deviations(list(METHODS), list(WAYS), [FULL_RANK])
    print("| method | " + " | ".join(WAYS) + " | full rank |")
    print("| --- |" + " --- |" * (len(WAYS) + 1))
    for method, row in table.items():
        worst = max(x for x in full[method].values() if not isinstance(x, str))
        cells = [x.partition(":")[0] if isinstance(x, str) else f"{x:.0e}" for x in [*row.values(), worst]]
        print(f"| `{method}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    from tests.benchmarks import world_sizes  # the ranks look for its functions by the name of the module

    world_sizes.main()
