"""Symmetric matrices as half their numbers, and sums whose order is fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_size(shape: Sequence[int]) -> int:
    """Numbers in the upper triangles of matrices of shape ``(*, d, d)``."""
    *stack, d, _ = shape
    return int(torch.Size(stack).numel()) * (d * (d + 1) // 2)


def pack(matrix: Tensor) -> Tensor:
    r"""The upper triangles of symmetric matrices ``(*, d, d)`` as one vector, without an index.

    With :math:`A = \begin{pmatrix} P & Q \\ Q^\top & R \end{pmatrix}` split in the middle, the upper triangle of P and
    the lower one of R fill a rectangle (rectangular full packed format).

    References:
        Gustavson, Wasniewski, Dongarra and Langou (2010), "Rectangular full packed format for Cholesky's algorithm"
    """
    d = matrix.shape[-1]
    n, m = d - d // 2, d // 2
    rectangle = matrix.new_zeros(*matrix.shape[:-2], m + 1, n)
    rectangle[..., :n, :] += matrix[..., :n, :n].triu()
    rectangle[..., 1:, :m] += matrix[..., n:, n:].tril()
    return torch.cat([matrix[..., :n, n:].reshape(-1), rectangle.reshape(-1)])


def unpack(vector: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack`: matrices ``(*, d, d)``."""
    *stack, d, _ = shape
    n, m = d - d // 2, d // 2
    count = int(torch.Size(stack).numel()) * n * m
    rectangle = vector[count:].view(*stack, m + 1, n)
    out = vector.new_empty(*shape)
    out[..., :n, n:] = vector[:count].view(*stack, n, m)
    out[..., n:, :n] = out[..., :n, n:].mT
    upper, lower = rectangle[..., :n, :].triu(), rectangle[..., 1:, :m].tril()
    out[..., :n, :n] = upper + upper.triu(1).mT
    out[..., n:, n:] = lower + lower.tril(-1).mT
    return out


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Sum of neighbours, of their sums, and so on: sums of halves of a power of two are sums on the way."""
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def add_up_in_place(parts: list[Tensor]) -> Tensor:
    """:func:`tree_sum` without memory of its own: it writes into the parts."""
    while len(parts) > 1:
        for a, b in zip(parts[::2], parts[1::2], strict=False):
            a += b
        parts = parts[::2]
    return parts[0]
