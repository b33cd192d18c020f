"""Naive float64 updates, written from the papers' equations with numpy, one parameter at a time.

Each takes the first value of a parameter and its gradients, and gives the values after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
Trajectory = list[Array]


class SmallModel(nn.Module):
    """Parameters of every order: a convolution, matrices, vectors, a number."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.conv = nn.Conv2d(2, 3, 2)
        self.hidden = nn.Linear(3, 4)
        self.out = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7 + (p.ndim == 0)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.conv(x)).mean((-2, -1))
        return self.scale * self.out(torch.tanh(self.hidden(features)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A new batch at every step, so that gradients have full rank and do not vanish."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(12, 4, generator=generator, dtype=torch.float64) + x.mean((1, 2, 3))[:, None]


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = batch(step)
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def run(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 20) -> tuple[dict, dict]:
    """Train; gives the values of each parameter (before the first step and after each), and its gradients."""
    model = SmallModel()
    optimizer = make(model)
    values = {name: [p.detach().numpy().copy()] for name, p in model.named_parameters()}
    gradients: dict[str, list[Array]] = {name: [] for name in values}
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for name, p in model.named_parameters():
            gradients[name].append(p.grad.numpy().copy())
        optimizer.step()
        for name, p in model.named_parameters():
            values[name].append(p.detach().numpy().copy())
    return values, gradients


def assert_equals_reference(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    reference: Callable[..., Iterator[Array]],
    options: dict[str, Any],
    steps: int = 20,
    tolerance: float = 1e-10,
) -> None:
    values, gradients = run(make, steps)
    for name, observed in values.items():
        expected = list(reference(observed[0], gradients[name], **options))
        assert len(expected) == steps
        for step, (ours, theirs) in enumerate(zip(observed[1:], expected, strict=True), 1):
            error = np.abs(ours - theirs).max()
            assert error <= tolerance, f"{name} is {error:.1e} off after step {step}"
        assert np.abs(observed[-1] - observed[0]).max() > 1e-4, f"{name} did not move"


# Linear algebra from the definitions


def unfold(x: Array, axis: int) -> Array:
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def along(x: Array, matrix: Array, axis: int) -> Array:
    return np.moveaxis(np.einsum("ij,j...->i...", matrix, np.moveaxis(x, axis, 0)), 0, axis)


def symmetric_power(matrix: Array, exponent: float, floor: float) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.maximum(values, floor) ** exponent) @ vectors.T


def tiles(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    yield from product(*[[slice(i, i + size) for i in range(0, n, size)] for n in shape])


# Methods


def adam(theta: Array, gradients: list[Array], lr: float, betas: tuple, eps: float, decay: float = 0.0) -> Iterator:
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        theta = (1 - lr * decay) * theta - lr * step
        yield theta


def soap(
    theta: Array, gradients: list[Array], lr: float, betas: tuple, eps: float, period: int, decay: float = 0.0
) -> Iterator:
    if theta.ndim < 2:
        yield from adam(theta, gradients, lr, betas, eps, decay)
        return
    axes = range(theta.ndim)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    factors = [np.zeros((n, n)) for n in theta.shape]
    for t, g in enumerate(gradients, 1):
        if t == 1:
            factors = [(1 - betas[1]) * unfold(g, k) @ unfold(g, k).T for k in axes]
            bases = [np.linalg.eigh(f)[1] for f in factors]

        def rotated(x, bases=bases):
            for k in axes:
                x = along(x, bases[k].T, k)
            return x

        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * rotated(g) ** 2
        step = rotated(m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        for k in axes:
            step = along(step, bases[k], k)
        theta = (1 - lr * decay) * theta - lr * step
        yield theta
        if t > 1:
            factors = [betas[1] * f + (1 - betas[1]) * unfold(g, k) @ unfold(g, k).T for k, f in enumerate(factors)]
            if t % period == 0:
                for k in axes:
                    order = np.argsort(-np.diag(bases[k].T @ factors[k] @ bases[k]))
                    # The square root of the rounding errors keeps null directions apart from rounding errors.
                    shift = np.sqrt(np.finfo(float).eps) * np.linalg.norm(factors[k])
                    sorted_basis = bases[k][:, order]
                    bases[k] = np.linalg.qr(factors[k] @ sorted_basis + shift * sorted_basis)[0]
                    v = np.take(v, order, axis=k)
