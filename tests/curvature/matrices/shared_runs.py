"""What the ranks of the tests on data that are shared out run: the matrix of all data, from the share of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import curvature
import solvers

#: Rows of each rank: unequal ones, and none at all.
SHARES = {"unequal": (9, 4), "one has none": (13, 0)}


class Net(nn.Module):
    """A network one layer of which is used for positive inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.double().parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.rare(h) if bool((x[:1, 0] > 0).all()) and len(x) else h)


def data() -> list[tuple[Tensor, Tensor]]:
    """Batches of all data; the rare layer is used in the second half of them alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(13, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.cat([-x[:7, 0].abs(), x[7:, 0].abs()])
    y = torch.randint(3, (13,), generator=generator)
    y[2] = y[11] = -100
    return [(x[:4], y[:4]), (x[4:7], y[4:7]), (x[7:9], y[7:9]), (x[9:], y[9:])]


def own(shares: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The batches of this rank."""
    begin = sum(shares[: dist.get_rank()])
    out, seen = [], 0
    for x, y in data():
        low, high = max(begin - seen, 0), min(begin + shares[dist.get_rank()] - seen, len(x))
        if low < high:
            out.append((x[low:high], y[low:high]))
        seen += len(x)
    return out


LOSSES = {
    "mean": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
}

MATRICES: dict[str, Callable[..., Any]] = {
    "hessian": lambda *a, **k: curvature.hessian(*a, **k),
    "hessian dense": lambda *a, **k: curvature.hessian(*a, structure="dense", **k),
    "hessian layer": lambda *a, **k: curvature.hessian(*a, structure="layer", **k),
    "hessian diagonal": lambda *a, **k: curvature.hessian(*a, structure="diagonal", **k),
    "ggn": lambda *a, **k: curvature.ggn(*a, **k),
    "ggn kept": lambda *a, **k: curvature.ggn(*a, keep_graph=True, **k),
    "ggn dense": lambda *a, **k: curvature.ggn(*a, structure="dense", **k),
    "ggn low rank": lambda *a, **k: curvature.ggn(*a, structure="low_rank", **k),
    "empirical": lambda *a, **k: curvature.fisher(*a, kind="empirical", **k),
    "covariance": lambda *a, **k: curvature.gradient_covariance(*a, **k),
    "covariance layer": lambda *a, **k: curvature.gradient_covariance(*a, structure="layer", **k),
    **{
        f"{structure} {kind}": lambda *a, structure=structure, kind=kind, **k: curvature.fisher(
            *a, structure=structure, kind=kind, **k
        )
        for structure in ("kfac", "ekfac", "layer", "unit", "diagonal", "tnt", "foof")
        for kind in ("exact", "empirical")
    },
}


def gaps() -> dict[str, float]:
    """Relative distances of the matrices to those of one process that has all data."""
    group, out = dist.group.WORLD, {}
    for name, shares in SHARES.items():
        for reduction, loss in LOSSES.items():
            for matrix, make in MATRICES.items():
                alone = make(Net(), loss(), data()).to_dense()
                found = make(Net(), loss(), own(shares), process_group=group).to_dense()
                gap = float((found - alone).abs().max() / alone.abs().max())
                out[f"{matrix}, {reduction}, {name}"] = gap
    return out


def estimates() -> dict[str, float]:
    """What solvers find of a matrix whose data are shared out."""
    mine, group = own((9, 4)), dist.group.WORLD
    alone = curvature.ggn(Net(), nn.CrossEntropyLoss(), data())
    found = curvature.ggn(Net(), nn.CrossEntropyLoss(), mine, process_group=group)
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    return {
        "eigsh": float((solvers.eigsh(found, 3).values - solvers.eigsh(alone, 3).values).abs().max()),
        "trace": abs(
            solvers.trace(found, samples=4, generator=seeded()).value
            - solvers.trace(alone, samples=4, generator=seeded()).value
        ),
        "inverse": float(
            solvers.CG(rtol=1e-12)
            .solve(found.shift(0.1), b := torch.ones(found.shape[0], dtype=torch.float64))
            .sub(solvers.CG(rtol=1e-12).solve(alone.shift(0.1), b))
            .abs()
            .max()
        ),
    }


def influences() -> dict[str, float]:
    """Scores of the examples of this rank, by a curvature that is estimated from the examples of all."""
    x, y = data()[0]
    loss, kfac = nn.CrossEntropyLoss(), curvature.KroneckerFisher("exact")
    alone, found = (
        curvature.influence(Net(), loss, batches, (x, y), curvature=kfac, damping=0.1, process_group=group)
        for batches, group in ((data(), None), (own((9, 4)), dist.group.WORLD))
    )
    whole, mine = (
        curvature.self_influence(Net(), loss, batches, curvature=kfac, damping=0.1, process_group=group)
        for batches, group in ((data(), None), (own((9, 4)), dist.group.WORLD))
    )
    place = slice(0, 9) if dist.get_rank() == 0 else slice(9, 13)
    return {
        "queries": float((found.scores - alone.scores[:, place]).abs().max() / alone.scores.abs().max()),
        "self": float((mine - whole[place]).abs().max() / whole.abs().max()),
        "total": abs(found.total - alone.total),
    }


def draws() -> dict[str, Any]:
    """Monte-Carlo matrices: draws differ between ranks, and their mean over many is the exact matrix."""
    mine, group, out = own((9, 4)), dist.group.WORLD, {}
    exact = curvature.fisher(Net(), nn.CrossEntropyLoss(), data(), kind="exact").to_dense()
    for structure in ("full", "layer"):
        found = curvature.fisher(
            Net(), nn.CrossEntropyLoss(), mine, kind="mc", structure=structure, samples=400, process_group=group
        ).to_dense()
        where = found != 0 if structure == "layer" else torch.ones_like(found, dtype=torch.bool)
        out[structure] = float((found - exact)[where].norm() / exact.norm())
        out[f"{structure} same"] = len({float(x.sum()) for x in all_ranks(found)}) == 1
    return out


def all_ranks(x: Tensor) -> list[Tensor]:
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.contiguous())
    return out


def refusals() -> dict[str, str]:
    mine, group, told = own((9, 4)), dist.group.WORLD, {}
    broken = [(x * float("nan"), y) for x, y in mine] if dist.get_rank() == 1 else mine
    H = curvature.hessian(Net(), nn.CrossEntropyLoss(), mine, process_group=group)
    cases: dict[str, Callable[[], Any]] = {
        "vectors": lambda: H @ torch.full((H.shape[0],), float(dist.get_rank()), dtype=torch.float64),
        "product": lambda: curvature.hessian(Net(), nn.CrossEntropyLoss(), broken, process_group=group).to_dense(),
        "estimate": lambda: curvature.ggn(Net(), nn.CrossEntropyLoss(), broken, structure="kfac", process_group=group),
        "nothing": lambda: curvature.ggn(Net(), nn.CrossEntropyLoss(), [], structure="kfac", process_group=group),
        "rows": lambda: curvature.fisher(
            Net(), nn.CrossEntropyLoss(), mine, structure=curvature.GramFisher(), process_group=group
        ),
        "resume": lambda: curvature.fisher(
            Net(), nn.CrossEntropyLoss(), mine, structure="kfac", resume="unused", process_group=group
        ),
    }
    for name, make in cases.items():
        try:
            make()
            told[name] = ""
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def on_two() -> dict[str, Any]:
    return {check.__name__: check() for check in (gaps, estimates, influences, draws, refusals)}
