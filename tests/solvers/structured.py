"""Matrices that training makes and random ones are not: zeros, ties, low rank, extreme and mixed scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def structured(n: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Positive semi-definite matrices ``(n, n)``, float64, by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gram(x: Tensor) -> Tensor:
        return x @ x.mT

    few = torch.randperm(n, generator=generator)[: max(1, n // 16)]
    rows = torch.zeros(n, 32, dtype=torch.float64)
    rows[few] = normal(len(few), 32)
    words = torch.zeros(n, 32, dtype=torch.float64)
    words.scatter_(0, torch.randint(n, (min(5, n), 32), generator=generator), 1.0)
    whole = gram(normal(n, 2 * n)) / n
    part = max(1, n // 4)
    blocks = torch.block_diag(*[gram(normal(min(part, n - i), 2)) for i in range(0, n, part)])
    grades = 10.0 ** torch.linspace(0, -20, n, dtype=torch.float64)
    yield "rows of zeros", gram(rows)
    yield "low rank and zeros", gram(torch.where(torch.arange(n)[:, None] % 2 == 0, normal(n, max(1, n // 8)), 0))
    yield "bag of words", gram(words) / 32
    yield "zero", torch.zeros(n, n, dtype=torch.float64)
    yield "ties", 2 * torch.eye(n, dtype=torch.float64)
    yield "tied directions", torch.eye(n, dtype=torch.float64) + torch.ones(n, n, dtype=torch.float64)
    yield "rank one", gram(normal(n, 1))
    yield "low rank", gram(normal(n, max(1, n // 8)))
    yield "counts", gram(torch.randint(0, 3, (n, 7), generator=generator).double())
    yield "blocks", blocks
    yield "graded", grades[:, None] * whole * grades
    yield "tiny", 1e-30 * whole
    yield "subnormal", 1e-38 * whole
    yield "huge", 1e30 * whole
    yield "full", whole
