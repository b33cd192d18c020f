"""What the ranks of the tests on posteriors of shared data run, and the same in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from laplace import Laplace
from laplace.baselaplace import ELLA
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import solvers
from curvature.laplace import (
    EFBackend,
    GGNBackend,
    HessianBackend,
    LinearizedLaplace,
    OnlineLaplace,
    PosteriorSampler,
    evidence,
)
from tests.curvature.laplace.problems import toy

#: Structure and subset of the weights, with a backend.
POSTERIORS: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "full": ("full", "all", GGNBackend, {}),
    "diag": ("diag", "all", GGNBackend, {}),
    "diagonal": ("diagonal", "all", EFBackend, {}),
    "kron": ("kron", "all", GGNBackend, {}),
    "kfac": ("kfac", "all", EFBackend, {}),
    "ekfac": ("ekfac", "all", GGNBackend, {}),
    "low rank": ("low_rank", "all", GGNBackend, {"low_rank": 5}),
    "low rank and diagonal": ("low_rank_diag", "all", GGNBackend, {"low_rank": 5}),
    "Hessian": ("full", "all", HessianBackend, {}),
    "Hessian, low rank": ("low_rank", "all", HessianBackend, {"low_rank": 3}),
    "last layer, kron": ("kron", "last_layer", GGNBackend, {}),
    "last layer, full": ("full", "last_layer", GGNBackend, {}),
    "last layer, ekfac": ("ekfac", "last_layer", GGNBackend, {}),
}


def loader(kind: str, part: slice) -> tuple[nn.Module, DataLoader]:
    model, x, y = toy(kind)
    return model, DataLoader(TensorDataset(x[part], y[part]), batch_size=3)


def fitted(kind: str, name: str, part: slice, group: Any, break_last: bool = False) -> Any:
    structure, subset, backend, options = POSTERIORS[name]
    model, data = loader(kind, part)
    if break_last:
        data.dataset.tensors[0][-1] = float("nan")  # type: ignore[attr-defined]
    shared = {} if group is None else {"process_group": group}
    la = Laplace(
        model,
        kind,
        subset_of_weights=subset,
        hessian_structure=structure,
        backend=backend,
        backend_kwargs=options | shared,
        prior_precision=30.0 if backend is HessianBackend else 2.0,
    )
    la.fit(data)
    return la


def numbers(la: Any, x: Tensor) -> Tensor:
    """All that a posterior says: evidence, its parts, and a prediction."""
    found = la(x[:4], pred_type="glm", link_approx="probit")
    parts = found if isinstance(found, tuple) else (found,)
    scalars = [la.log_marginal_likelihood(), la.log_likelihood, torch.as_tensor(float(la.n_data))]
    return torch.cat([torch.as_tensor(p).detach().double().reshape(-1) for p in (*scalars, *parts)])


def gaps(share: slice) -> dict[str, float]:
    out = {}
    for kind in ("classification", "regression"):
        for name in POSTERIORS:
            _, x, _ = toy(kind)
            alone = numbers(fitted(kind, name, slice(None), None), x)
            found = numbers(fitted(kind, name, share, dist.group.WORLD), x)
            out[f"{name}, {kind}"] = float(((found - alone).abs() / (1 + alone.abs())).max())
    return out


def matrix_free(share: slice) -> dict[str, Any]:
    model, x, y = toy()
    alone = LinearizedLaplace(model, "classification", (x, y), prior_precision=2.0)
    mine = [(x[share], y[share])] if len(x[share]) else []
    found = LinearizedLaplace(model, "classification", mine, prior_precision=2.0, process_group=dist.group.WORLD)
    one, other = (evidence(la, samples=4, steps=20, sketch=None) for la in (alone, found))
    draws = found.draw(1000, torch.Generator().manual_seed(0))
    exact = float(solvers.trace(alone.curvature).value)
    samples = PosteriorSampler(found, samples=3, preconditioner=None)()
    return {
        "evidence": abs(float(one.value.value - other.value.value)),
        "trace of draws": float(draws.square().sum(1).mean()) / exact,
        "samples": samples.deviations.tolist(),
        "observation": repr(found.observation),
    }


def refusals(share: slice) -> dict[str, str]:
    group, told = dist.group.WORLD, {}
    model, own = loader("classification", share)

    kron = fitted("classification", "kron", share, group)
    cases = {
        "extended": lambda: kron.fit(own, override=False),
        "no data": lambda: fitted("classification", "kron", slice(0, 0) if dist.get_rank() else share, group),
        "online": lambda: OnlineLaplace(kron),
        "functional": lambda: ELLA(
            model,
            "classification",
            backend=GGNBackend,
            backend_kwargs={"process_group": group},
            subsample_size=6,
            n_eigenvalues=4,
        ).fit(own),
        "broken": lambda: fitted("classification", "kron", share, group, break_last=dist.get_rank() == 1),
    }
    for name, make in cases.items():
        try:
            make()
            told[name] = ""
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def on_two() -> dict[str, Any]:
    share = slice(0, 7) if dist.get_rank() == 0 else slice(7, None)
    free = matrix_free(share), matrix_free(slice(None) if dist.get_rank() else slice(0, 0))
    return {"gaps": gaps(share), "free": free, "refusals": refusals(share)}
