"""Algorithms of compression written out from their papers, entry by entry."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def unit_lower(A: Tensor) -> Tensor:
    """U of ``A = U D U^T``, by elimination."""
    A = A.clone()
    d = len(A)
    U = torch.eye(d, dtype=A.dtype)
    for k in range(d):
        for i in range(k + 1, d):
            U[i, k] = A[i, k] / A[k, k]
            A[i] = A[i] - U[i, k] * A[k]
    return U


def two_sided(W: Tensor, A: Tensor, B: Tensor, nearest) -> Tensor:  # type: ignore[no-untyped-def]
    """The recursion of Tseng et al. (2025) for one entry after another, from the last column and row."""
    U, V = unit_lower(A), unit_lower(B)
    m, n = W.shape
    E, out = torch.zeros_like(W), torch.zeros_like(W)
    for j in reversed(range(n)):
        c = E[:, j + 1 :] @ U[j + 1 :, j]
        for i in reversed(range(m)):
            x = W[i, j] + V[:, i] @ c + V[i + 1 :, i] @ E[i + 1 :, j]
            out[i, j] = nearest(x, i, j)
            E[i, j] = W[i, j] - out[i, j]
    return out


def gptq(W: Tensor, H: Tensor, nearest) -> Tensor:  # type: ignore[no-untyped-def]
    """GPTQ as published (Frantar et al. 2022, algorithm 1): columns from the first to the last, by the inverse of H."""
    W = W.clone()
    inverse = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    out = torch.zeros_like(W)
    for j in range(W.shape[1]):
        for i in range(W.shape[0]):
            out[i, j] = nearest(W[i, j], i, j)
        error = (W[:, j] - out[:, j]) / inverse[j, j]
        W[:, j:] -= error[:, None] * inverse[j, j:][None]
    return out


def form(E: Tensor, A: Tensor, B: Tensor) -> float:
    """``tr(B E A E^T) / 2``."""
    return float(torch.trace(B @ E @ A @ E.T)) / 2


def best_on_grid(W: Tensor, A: Tensor, B: Tensor, values: list[list[list[float]]]) -> float:
    """The least form over every choice of one of ``values[i][j]`` for each entry."""
    m, n = W.shape
    choices = [values[i][j] for i in range(m) for j in range(n)]
    return min(form(W - torch.tensor(x, dtype=W.dtype).view(m, n), A, B) for x in product(*choices))


def spd(d: int, generator: torch.Generator) -> Tensor:
    """A random positive definite matrix of some condition."""
    R = torch.randn(d, 2 * d, generator=generator, dtype=torch.float64)
    R[1:] += 0.7 * R[:-1]
    return R @ R.T / d
