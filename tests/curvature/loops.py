"""One training step of a plain loop, and the statistics it leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

import curvature
from curvature import Curvature, DiagonalFisher, EigenbasisFisher, KroneckerFisher
from precond import Eigh, Loop, PreconditionedOptimizer, Tikhonov

STRUCTURES: dict[str, Callable[[str], Curvature]] = {
    "kfac": KroneckerFisher,  # type: ignore[dict-item]
    "ekfac": EigenbasisFisher,  # type: ignore[dict-item]
    "diagonal": DiagonalFisher,  # type: ignore[dict-item]
}


def watching(
    model: nn.Module, loss_fn: Any, structure: str = "kfac", kind: str = "exact", **options: Any
) -> PreconditionedOptimizer:
    """An optimizer that learns the curvature and moves nothing (lr = 0); settings of its loop are among the options."""
    names = {field.name for field in fields(Loop)}
    loop = Loop(**{name: value for name, value in options.items() if name in names})
    return PreconditionedOptimizer(
        model,
        loss_fn,
        curvature=STRUCTURES[structure](kind),
        damping=Tikhonov(1e-2),
        solver=Eigh(),
        loop=loop,
        **{"lr": 0.0, **{name: value for name, value in options.items() if name not in names}},
    )


def run(model: nn.Module, x: Any) -> Tensor:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def statistics(optimizer: PreconditionedOptimizer) -> dict[str, Tensor]:
    """The dense block of C by block name."""
    return {name: p.estimator.operator().to_dense() for name, p in optimizer.preconditioners.items()}


def step(optimizer: PreconditionedOptimizer, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Backward through every loss, one step, and the statistics."""
    optimizer.zero_grad()
    for loss in losses:
        loss().backward()
    optimizer.step()
    return statistics(optimizer)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-9) -> None:
    """The same blocks with the same numbers, which are not all zero."""
    assert actual.keys() == expected.keys()
    for name, block in expected.items():
        assert block.abs().max() > 0, f"{name} is zero: the comparison says nothing"
        error = (actual[name] - block).abs().max() / block.abs().max()
        assert error < rtol, f"{name} differs by {error:.2e}"


def silently(function: Callable[[], Any]) -> Any:
    """Call with warnings off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def fisher(*args: Any, structure: Any = "kfac", **options: Any) -> dict[str, Tensor]:
    """The dense blocks of :func:`curvature.fisher` by block name."""
    operator: Any = curvature.fisher(*args, structure=structure, **options)
    return {place.block.name: block.to_dense() for place, block in zip(operator.places, operator.blocks, strict=True)}


def mlp(seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int, seed: int = 1, features: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, classes, (n,), generator=generator)
