"""What the ranks of the distributed tests run, and the same in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from curvature import InputKronecker
from precond import (
    EKFAC,
    KBFGS,
    KFAC,
    SINGD,
    TNT,
    Cholesky,
    FactoredTikhonov,
    NaturalGradient,
    PreconditionedOptimizer,
)

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """An MLP with a norm and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(x)))) * self.scale


class Conv(nn.Module):
    """A small CNN, with groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 2, groups=2), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))).mean((2, 3)))


class Language(nn.Module):
    """A transformer layer between an embedding and the head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(self.embed(x)), self.embed.weight).flatten(0, 1)


class Branch(Net):
    """A net with a second head, which is used where the input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(7, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        return torch.where(x[:, :1] > 0, self.second(h), self.other(h)) if bool((x[:, 0] > 0).any()) else self.second(h)


def vectors(steps: int = 4, rows: int = 16) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(rows, 5, dtype=torch.float64), torch.randint(3, (rows,))) for _ in range(steps)]


def images(steps: int = 4, rows: int = 8) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(rows, 2, 5, 5, dtype=torch.float64), torch.randint(3, (rows,))) for _ in range(steps)]


def tokens(steps: int = 4, rows: int = 8) -> list[Batch]:
    """Targets are padded, each row to another length."""
    torch.manual_seed(1)
    out = []
    for _ in range(steps):
        x, y = torch.randint(11, (rows, 5)), torch.randint(11, (rows, 5))
        y[torch.arange(5) >= 2 + (torch.arange(rows) % 4).unsqueeze(1)] = -100
        out.append((x, y))
    return out


def foof(model: nn.Module, loss_fn: nn.Module, **options: Any) -> PreconditionedOptimizer:
    return PreconditionedOptimizer(
        model,
        loss_fn,
        curvature=InputKronecker("empirical"),
        damping=FactoredTikhonov(0.1),
        solver=Cholesky(),
        **options,
    )


#: Every method that learns from layers and adds up over processes, with one set of options for each structure.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kfac exact": (KFAC, {"fisher": "exact", "inverse_update_period": 2}),
    "kfac empirical": (KFAC, {"fisher": "empirical", "curvature_update_period": 2}),
    "ekfac": (EKFAC, {"fisher": "exact", "inverse_update_period": 2}),
    "tnt": (TNT, {"fisher": "exact"}),
    "singd": (SINGD, {"fisher": "exact"}),
    "singd block": (SINGD, {"fisher": "exact", "structure": "block"}),
    "natural dense": (NaturalGradient, {"fisher": "exact", "structure": "dense"}),
    "natural layer": (NaturalGradient, {"fisher": "exact", "structure": "layer"}),
    "natural unit": (NaturalGradient, {"fisher": "exact", "structure": "unit"}),
    "natural diagonal": (NaturalGradient, {"fisher": "exact", "structure": "diagonal"}),
    "foof": (foof, {}),
    "kbfgs": (KBFGS, {}),
    "mixed": (KFAC, {"fisher": "exact", "structures": {"second": "layer", "norm": "diagonal", "scale": None}}),
}


def make(name: str, model: nn.Module, loss_fn: nn.Module | None = None, **options: Any) -> Any:
    cls, own = METHODS[name]
    return cls(model, loss_fn or nn.CrossEntropyLoss(), **{"lr": 0.1, **own, **options})


def mine(number: int) -> slice:
    """The examples of a batch that are this rank's; all in one process."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return slice(rank * number // size, (rank + 1) * number // size)


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(optimizer: Any, call: Callable[[Tensor], Tensor], batches: Iterable[Batch], weight: float = 1.0) -> None:
    """The plain loop, on this rank's share of each batch."""
    for x, y in batches:
        part = mine(len(x))
        optimizer.zero_grad()
        (weight * optimizer.loss_fn(call(x[part]), y[part].flatten())).backward()
        optimizer.step()


def in_parallel(
    name: str, model: nn.Module, batches: list[Batch], wrap: dict[str, Any], **options: Any
) -> list[Tensor]:
    """Training of a wrapped model."""
    parallel = DistributedDataParallel(model, **wrap)
    train(make(name, parallel, **options), parallel, batches)
    return parameters(model)


def alone(name: str, model: nn.Module, batches: list[Batch], **options: Any) -> list[Tensor]:
    """The same in one process, on whole batches."""
    optimizer = make(name, model, **options)
    for x, y in batches:
        optimizer.zero_grad()
        optimizer.loss_fn(model(x), y.flatten()).backward()
        optimizer.step()
    return parameters(model)


def averaged(model: nn.Module) -> None:
    """Average gradients by hand; where a rank has none, it takes part with zeros."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def accumulated(optimizer: Any, call: Any, batches: list[Batch]) -> None:
    """Two halves of each share, one after the other, before a step."""
    for x, y in batches:
        x, y = x[mine(len(x))], y[mine(len(y))]
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        optimizer.zero_grad()
        for index, (a, b) in enumerate(halves):
            waits = index == 0 and isinstance(call, DistributedDataParallel)
            with call.no_sync() if waits else nullcontext():
                (optimizer.loss_fn(call(a), b) / 2).backward()
        optimizer.step()


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def fractions() -> Iterator[float]:
    size = dist.get_world_size()
    yield from (k / size for k in range(1, size + 1) if size % k == 0)
