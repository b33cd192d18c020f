"""Naive matrices from the definitions, in numpy, sharing nothing with the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kron(*matrices: Tensor) -> Tensor:
    """Entry by entry: ``K[(i1, i2, ...), (j1, j2, ...)] = F1[i1, j1] F2[i2, j2] ...``."""
    rows, columns = [m.shape[0] for m in matrices], [m.shape[1] for m in matrices]
    result = np.zeros((int(np.prod(rows)), int(np.prod(columns))))
    for row, i in enumerate(np.ndindex(*rows)):
        for column, j in enumerate(np.ndindex(*columns)):
            result[row, column] = np.prod([float(m[a, b]) for m, a, b in zip(matrices, i, j, strict=True)])
    return torch.from_numpy(result)


def block_diagonal(*matrices: Tensor) -> Tensor:
    """Blocks along the diagonal, zeros elsewhere."""
    rows, columns = sum(m.shape[0] for m in matrices), sum(m.shape[1] for m in matrices)
    result = torch.zeros(rows, columns, dtype=torch.float64)
    row = column = 0
    for m in matrices:
        result[row : row + m.shape[0], column : column + m.shape[1]] = m
        row, column = row + m.shape[0], column + m.shape[1]
    return result


def power(matrix: Tensor, exponent: float) -> Tensor:
    """``matrix ** exponent`` of a symmetric matrix, through numpy's eigendecomposition."""
    values, vectors = np.linalg.eigh(matrix.double().numpy())
    return torch.from_numpy((vectors * values**exponent) @ vectors.T)


def product(matrix: Tensor, x: Tensor, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> Tensor:
    """The matrix times each flattened element of the batch, one at a time."""
    batch = x.shape[: x.ndim - len(in_shape)]
    result = torch.zeros(*batch, *out_shape, dtype=torch.float64)
    for index in np.ndindex(*batch):
        result[index] = (matrix @ x[index].flatten()).reshape(out_shape)
    return result
