"""Loops of users whose ranks differ: in micro-batches, sizes, layers that one rank alone uses, inf of a scaler."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precond import EKFAC, KFAC, SOAP, Muon, Shampoo
from tests.precond.distributed.checks import Batch, Language, Net, parameters, tokens, vectors

#: Methods of both kinds.
METHODS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "KFAC": lambda model, loss_fn: KFAC(
        model, loss_fn, lr=0.1, fisher="empirical", inverse_update_period=2, memory_fraction=1 / processes()
    ),
    "EKFAC": lambda model, loss_fn: EKFAC(model, loss_fn, lr=0.1, fisher="empirical", inverse_update_period=2),
    "SOAP": lambda model, _: SOAP(model.parameters(), lr=0.02, inverse_update_period=2),
    "Muon": lambda model, _: Muon(model.parameters(), lr=0.02),
    "Shampoo": lambda model, _: Shampoo(model.parameters(), lr=0.02, inverse_update_period=2, damping=1e-8),
}


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Two(Net):
    """A net with a second head, which is used where the caller says so."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(7, 3).double()

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        return self.second(h) + self.other(h) if both else self.second(h)


class Padded(Language):
    """Without biases: that of the keys has no gradient, whose rounding errors Adam would follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, bias=False).double()


#: Micro-batches of a rank: options of the call, inputs, targets, weight of the loss.
Micro = list[tuple[dict[str, Any], Tensor, Tensor, float]]


def shares(batch: Batch, sizes: list[int]) -> list[Batch]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))


def uneven(step: int) -> list[Micro]:
    """Each rank accumulates over micro-batches of two sizes of its own."""
    cuts = [[5, 3], [2, 6]]
    return [
        [({}, x, y, len(x) / 8) for x, y in shares(share, cut)]
        for share, cut in zip(shares(vectors()[step], [8, 8]), cuts, strict=True)
    ]


def numbers(step: int) -> list[Micro]:
    """One rank accumulates over three micro-batches, the other takes one."""
    cuts = [[3, 2, 3], [8]]
    return [
        [({}, x, y, len(x) / 8) for x, y in shares(share, cut)]
        for share, cut in zip(shares(vectors()[step], [8, 8]), cuts, strict=True)
    ]


def unused(step: int) -> list[Micro]:
    """In every other step one rank uses a layer that the other does not."""
    return [
        [({"both": rank == 1 and step % 2 == 1}, x, y, 1.0)]
        for rank, (x, y) in enumerate(shares(vectors()[step], [8, 8]))
    ]


def unequal(step: int) -> list[Micro]:
    return [[({}, x, y, 1.0)] for x, y in shares(vectors()[step], [11, 5])]


def idle(step: int) -> list[Micro]:
    """One rank has no examples, and takes part with an empty batch."""
    x, y = vectors()[step]
    return [[({}, x, y, 1 / 8)], [({}, x[:0], y[:0], 1 / 8)]]


def padded(step: int) -> list[Micro]:
    return [[({}, x, y, 1.0)] for x, y in shares(tokens()[step], [5, 3])]


def freeze(model: Any, step: int) -> None:
    model.norm.requires_grad_(step != 1)


def leave(model: Any, step: int) -> None:
    pass


Loop = tuple[Callable[[], nn.Module], dict[str, Any], Callable[[int], list[Micro]], Callable[[Any, int], None], bool]

#: Model, options of DistributedDataParallel, micro-batches by rank, what is done before a step, whether it is scaled.
LOOPS: dict[str, Loop] = {
    "uneven micro-batches": (Net, {"gradient_as_bucket_view": True}, uneven, leave, False),
    "unequal numbers of micro-batches": (Net, {}, numbers, leave, False),
    "unused on one rank": (Two, {"find_unused_parameters": True}, unused, leave, False),
    "frozen for a step": (Net, {"find_unused_parameters": True}, unequal, freeze, False),
    "tied head, padded": (Padded, {"static_graph": True}, padded, leave, False),
    "inf on one rank": (Net, {}, unequal, leave, True),
    "no data on one rank": (Net, {}, idle, leave, False),
}


def loop(method: str, name: str) -> list[Tensor]:
    """Four steps; in one process the micro-batches of all ranks come one after the other."""
    build, wrap, micro, prepare, scaled = LOOPS[name]
    net, several = build(), dist.is_initialized()
    model = DistributedDataParallel(net, **wrap) if several else net
    loss_fn = nn.CrossEntropyLoss(reduction="sum" if micro is idle else "mean")
    optimizer = METHODS[method](model, loss_fn)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    for step in range(4):
        prepare(net, step)
        by_rank = micro(step)
        mine = by_rank[dist.get_rank()] if several else [one for some in by_rank for one in some]
        optimizer.zero_grad(set_to_none=micro is not numbers)
        for index, (options, x, y, weight) in enumerate(mine):
            last = index == len(mine) - 1
            with model.no_sync() if several and not last else nullcontext():
                loss = loss_fn(model(x, **options), y.flatten()) * (weight if several else weight / len(by_rank))
                overflows = scaled and step == 1 and last and (not several or dist.get_rank() == 1)
                scaler.scale(loss * float("inf") if overflows else loss).backward()
        with warnings.catch_warnings():
            if scaled:
                warnings.simplefilter("ignore")  # a step is skipped
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == (4.0 if scaled else 1.0)
    return parameters(net)


def every_loop() -> dict[str, list[Tensor]]:
    return {f"{method}, {name}": loop(method, name) for method in METHODS for name in LOOPS}
