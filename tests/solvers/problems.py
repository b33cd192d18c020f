"""Matrices to test with: seeded, float64, small."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(n: int, *stack: int, seed: int = 0) -> Tensor:
    """Symmetric positive definite ``(*stack, n, n)``, eigenvalues between about 0.5 and 5."""
    a = normal(*stack, n, 2 * n, seed=seed)
    return a @ a.mT / (2 * n) + 0.5 * torch.eye(n, dtype=torch.float64)


def symmetric(n: int, seed: int = 0) -> Tensor:
    """Symmetric indefinite."""
    a = normal(n, n, seed=seed)
    return a + a.mT


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    """Symmetric with the given eigenvalues."""
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    a = (q * torch.tensor(values, dtype=torch.float64)) @ q.mT
    return (a + a.mT) / 2
