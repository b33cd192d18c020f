"""Are statistics weighted by true counts where gradients are averaged by hand, and ranks have unequal shares?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precond import SOAP
from tests.distributed_run import ranks
from tests.precond.distributed.checks import (
    Batch,
    Branch,
    Language,
    Net,
    alone,
    averaged,
    distance,
    make,
    parameters,
    same,
    tokens,
    vectors,
)

pytestmark = pytest.mark.distributed

#: Where rank 0 ends: shares that differ from step to step, and one that is empty.
CUTS = (10, 3, 16, 8)


def share(batch: Batch, cut: int) -> Batch:
    x, y = batch
    part = slice(None, cut) if dist.get_rank() == 0 else slice(cut, None)
    return x[part], y[part]


def by_hand(name: str, model: nn.Module, loss_fn: nn.Module, batches: list[Batch], cuts: Any, **options: Any) -> Any:
    """Each rank weighs its mean by its share of the terms, and one without terms takes no part in the pass."""
    optimizer = make(name, model, loss_fn, process_group=dist.group.WORLD, **options)
    for batch, cut in zip(batches, cuts, strict=True):
        x, y = share(batch, cut)
        optimizer.zero_grad()
        terms = (y != -100).sum()
        if terms:
            loss = loss_fn(model(x), y.flatten())
            if loss_fn.reduction == "mean":
                loss = loss * terms * dist.get_world_size() / (batch[1] != -100).sum()
            loss.backward()
        averaged(model)
        optimizer.step()
    return parameters(model)


def unequal() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("kfac exact", "ekfac", "natural dense", "singd"):
        out[f"{name}, mean"] = by_hand(name, Net(), nn.CrossEntropyLoss(), vectors(), CUTS)
    for name in ("kfac exact", "ekfac"):
        out[f"{name}, sum"] = by_hand(name, Net(), nn.CrossEntropyLoss(reduction="sum"), vectors(), CUTS)
        out[f"{name}, branch"] = branched(name)
        out[f"{name}, unused"] = branched(name, wrapped=True)
        for what, fraction in (("tokens", 1.0), ("fraction", 0.5)):
            out[f"{name}, {what}"] = by_hand(
                name, Language(), nn.CrossEntropyLoss(), tokens(2), (3, 8), memory_fraction=fraction
            )
    out["soap, twice"] = soap()
    return out


def branched(name: str, wrapped: bool = False) -> list[Tensor]:
    """A head that rank 1 alone uses, by the data of its share."""
    model = Branch()
    call = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    optimizer = make(name, call, **({} if wrapped else {"process_group": dist.group.WORLD}))
    for x, y in branches():
        x, y = share((x, y), 8)
        optimizer.zero_grad()
        optimizer.loss_fn(call(x), y).backward()
        if not wrapped:
            averaged(model)
        optimizer.step()
    return parameters(model)


def branches() -> list[Batch]:
    """The first half of each batch never meets the second head, nor does the whole second batch."""
    found = []
    for step, (x, y) in enumerate(vectors()):
        x[:8, 0] = -x[:8, 0].abs()
        if step == 1:
            x[:, 0] = -x[:, 0].abs()
        found.append((x, y))
    return found


def both_shares(name: str, zeros: bool = True) -> list[Tensor]:
    """One process that runs the two shares one after the other."""
    model = Branch()
    optimizer = make(name, model)
    for x, y in branches():
        optimizer.zero_grad()
        for part in (slice(8), slice(8, None)):
            (optimizer.loss_fn(model(x[part]), y[part]) / 2).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None and zeros else p.grad
        optimizer.step()
    return parameters(model)


def soap() -> list[Tensor]:
    model = Net()
    optimizer = SOAP(model.parameters(), lr=0.01, process_group=dist.group.WORLD)
    for batch in vectors():
        x, y = share(batch, 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        averaged(model)
        optimizer.step()
    return parameters(model)


def summed(name: str) -> list[Tensor]:
    """One process whose gradient is half of the sum, as the mean of two ranks is."""
    model, loss_fn = Net(), nn.CrossEntropyLoss(reduction="sum")
    optimizer = make(name, model, loss_fn)
    for x, y in vectors():
        optimizer.zero_grad()
        (loss_fn(model(x), y) / 2).backward()
        optimizer.step()
    return parameters(model)


def test_unequal_shares_take_the_steps_of_one_process() -> None:
    one, other = ranks(unequal, 2, timeout=300)
    for key, values in one.items():
        assert same(values, other[key]), f"{key} differs between ranks"
        name, what = key.split(", ")
        if name == "soap":
            continue
        if what == "sum":
            expected = summed(name)
        elif what == "branch":
            expected = both_shares(name)
        elif what == "unused":
            expected = both_shares(name, zeros=False)
        else:
            model, batches = (Net(), vectors()) if what == "mean" else (Language(), tokens(2))
            expected = alone(name, model, batches)
        assert distance(values, expected) < 1e-10, key
    assert torch.isfinite(torch.cat([p.flatten() for p in one["soap, twice"]])).all()
