"""What the ranks run for the table of doors in docs/how-to/distributed.md, and what those doors say in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import curvature
import solvers
from curvature.reports.sections import density
from tests.curvature.matrices.shared_runs import Net, data, own

SHARES = (9, 4)
#: Functions that take a group, by the table; matrices, influences and posteriors are tested beside their own.
SERVED = (
    "hessian",
    "ggn",
    "fisher",
    "gradient_covariance",
    "gradient_variance",
    "gradient_second_moment",
    "report",
    "influence",
    "self_influence",
)
#: Functions that do not.
REFUSED = (
    "per_sample_gradients",
    "per_sample_norms",
    "jacobian",
    "ntk",
    "kernel_eigenvalues",
    "activation_hessian",
    "dynamics",
    "subspace",
    "surface",
    "interpolation",
    "coverage",
    "check_deterministic",
    "Monitor",
    "quantize",
    "prune",
)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def settings() -> dict[str, dict[str, Any]]:
    return {
        "formed": {},
        "by products": {"exact": False, "products": 250},
        "on request": {"sections": ("loss", "sensitivity"), "seed": 2},
    }


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of plain data, by their paths."""
    if isinstance(value, dict):
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list):
        pairs = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {path: value}
    return {k: v for key, entry in pairs for k, v in flat(entry, f"{path}/{key}").items()}


def differences(found: curvature.Report, alone: curvature.Report) -> dict[str, Any]:
    """Leaves in which two reports differ, but for what is time and memory; draws of the ranks are others."""
    mine, other = flat(json.loads(found.to_json())), flat(json.loads(alone.to_json()))
    own_to_a_run = ("/costs", "/seconds", "/peak_memory", "/created", "/sensitivity")
    keys = [key for key in mine | other if not key.startswith(own_to_a_run)]
    return {key: (mine.get(key), other.get(key)) for key in keys if not alike(mine.get(key), other.get(key))}


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-8, abs_tol=1e-9)
    return bool(one == other)


def reports() -> dict[str, Any]:
    group, out = dist.group.WORLD, {}
    cases = [(SHARES, name) for name in settings()] + [((0, 13), "formed")]  # one rank may have no data
    for shares, name in cases:
        loss, options = nn.CrossEntropyLoss(), settings()[name]
        found = curvature.report(Net(), loss, own(shares), k=2, process_group=group, **options)
        gaps = {}
        if dist.get_rank() == 0:
            gaps = differences(found, curvature.report(Net(), loss, data(), k=2, **options))
        out[f"{name}, {shares}"] = gaps, found.to_html(), found.to_json()
    return out


def clocked() -> dict[str, Any]:
    """A budget in seconds, of which each rank's clock says something else."""
    found = curvature.report(
        Net(), nn.CrossEntropyLoss(), own(SHARES), k=2, budget=1.5, exact=False, process_group=dist.group.WORLD
    )
    plan = curvature.report(
        Net(), nn.CrossEntropyLoss(), own(SHARES), budget=3, dry_run=True, process_group=dist.group.WORLD
    )
    return {"page": found.to_html(), "plan": str(plan)}


def files() -> dict[str, Any]:
    """One rank writes."""
    found = curvature.report(
        Net(), nn.CrossEntropyLoss(), own(SHARES), k=1, sections="loss", process_group=dist.group.WORLD
    )
    with TemporaryDirectory() as folder:  # one for each rank
        for suffix in ("html", "json", "pt"):
            found.save(Path(folder) / f"page.{suffix}")
        return {"written": sorted(path.name for path in Path(folder).iterdir())}


def section_that_fails() -> dict[str, Any]:
    """An error outside the passes over data, in one section of one rank."""
    before = density.smooth

    def fails(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("out of something")
        return before(*args)

    density.smooth = fails  # type: ignore[assignment]
    try:
        found = curvature.report(
            Net(), nn.CrossEntropyLoss(), own(SHARES), exact=False, products=400, process_group=dist.group.WORLD
        )
    finally:
        density.smooth = before
    return {"refused": [(r.part, r.error, r.message) for r in found.refused], "page": found.to_html()}


def operators() -> dict[str, float]:
    """Distances between what solvers find of one matrix whose data are shared out, and of that of one process."""
    group = dist.group.WORLD
    alone = curvature.ggn(Net(), nn.CrossEntropyLoss(), data())
    found = curvature.ggn(Net(), nn.CrossEntropyLoss(), own(SHARES), process_group=group)

    def pairs(H: Any) -> Any:
        values = solvers.eigsh(H, 3, rtol=1e-10)
        return values.values, values.vectors.abs()

    def density_of(H: Any) -> Any:
        curve = solvers.spectral_density(H, samples=3, steps=8, generator=seeded())
        return curve.density, curve.grid

    tries: dict[str, Callable[[Any], Any]] = {
        "eigsh": pairs,
        "eigsh below": lambda H: (solvers.eigsh(H, 1, which="SA", atol=1e-8).values,),
        "trace": lambda H: (solvers.trace(H, samples=4, generator=seeded()).value,),
        "trace by default": lambda H: (solvers.trace(H, samples=4).value,),
        "xtrace": lambda H: (solvers.trace(H, samples=6, method="xtrace", generator=seeded()).value,),
        "diagonal": lambda H: (solvers.diagonal(H, samples=4, generator=seeded()).value,),
        "norm": lambda H: (solvers.frobenius_norm(H, samples=4, generator=seeded()).value,),
        "logdet": lambda H: (solvers.logdet(H, damping=1.0, samples=4, generator=seeded()).value,),
        "density": density_of,
        "sketch": lambda H: (solvers.Nystrom(5).approximate(H).to_dense(),),
        "block": lambda H: (H.block("first.*").to_dense(),),
    }
    looks = {name: (look(found), look(alone)) for name, look in tries.items()}
    for door in (curvature.gradient_second_moment, curvature.gradient_variance):
        mine = door(Net(), nn.CrossEntropyLoss(), own(SHARES), process_group=group)
        looks[door.__name__] = tuple(mine.values()), tuple(door(Net(), nn.CrossEntropyLoss(), data()).values())
    return {
        name: max(float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()) for a, b in zip(*both, strict=True))
        for name, both in looks.items()
    }


def compressed() -> dict[str, float]:
    """Compression by an operator whose data are shared out."""
    x, y = data()[0]
    loss = nn.CrossEntropyLoss()
    alone, found = (
        curvature.fisher(Net(), loss, batches, structure="kfac", kind="exact", process_group=group)
        for batches, group in ((data(), None), (own(SHARES), dist.group.WORLD))
    )
    out = {}
    for name, door in (("quantize", curvature.quantize), ("prune", curvature.prune)):
        one, other = (door(Net(), loss, (x, y), structure=op, measure=False) for op in (alone, found))
        pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
        out[name] = max(float((p - q).detach().abs().max()) for p, q in pairs)
    return out


def refusals() -> dict[str, str]:
    """What the doors say that take no group, or not so."""
    group: Any = dist.group.WORLD
    model, loss, mine = Net(), nn.CrossEntropyLoss(), own(SHARES)
    x, y = mine[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doors: dict[str, Callable[..., Any]] = {
        "per_sample_gradients": lambda **k: curvature.per_sample_gradients(model, loss, (x, y), **k),
        "per_sample_norms": lambda **k: curvature.per_sample_norms(model, loss, (x, y), **k),
        "jacobian": lambda **k: curvature.jacobian(model, x, **k),
        "ntk": lambda **k: curvature.ntk(model, x, **k),
        "kernel_eigenvalues": lambda **k: curvature.kernel_eigenvalues(model, loss, mine, **k),
        "activation_hessian": lambda **k: curvature.activation_hessian(model, loss, (x, y), "first", **k),
        "dynamics": lambda **k: curvature.dynamics(model, loss, mine, optimizer, **k),
        "subspace": lambda **k: curvature.subspace(model, loss, mine, **k),
        "surface": lambda **k: curvature.surface(model, loss, mine, **k),
        "interpolation": lambda **k: curvature.interpolation(model, loss, mine, model.state_dict(), **k),
        "coverage": lambda **k: curvature.coverage(model, loss, mine, **k),
        "check_deterministic": lambda **k: curvature.check_deterministic(model, mine, **k),
        "Monitor": lambda **k: curvature.Monitor(model, loss, mine, **k),
        "quantize": lambda **k: curvature.quantize(model, loss, mine, **k),
        "prune": lambda **k: curvature.prune(model, loss, mine, **k),
        "report, resumed": lambda **k: curvature.report(model, loss, mine, resume="unused", **k),
        "fisher, resumed": lambda **k: curvature.fisher(model, loss, mine, structure="kfac", resume="unused", **k),
        "resumable_eigsh, of shares": lambda process_group: curvature.resumable_eigsh(
            curvature.hessian(model, loss, mine, process_group=process_group), "unused"
        ),
        "influence, stored": lambda **k: curvature.influence(model, loss, mine, (x, y), store="unused", **k),
    }
    told = {}
    for name, door in doors.items():
        try:
            door(process_group=group)
            told[name] = ""
        except (TypeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def on_two() -> dict[str, Any]:
    checks = (reports, clocked, files, section_that_fails, operators, compressed, refusals)
    return {check.__name__: check() for check in checks}
