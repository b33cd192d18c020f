"""Gradients as tensors with one matrix per axis: merging, blocking, Gram matrices, bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from solvers import Eigh, SolverError, Subspace


def merged_shape(shape: tuple[int, ...], limit: int | None) -> tuple[int, ...]:
    """Shape after dropping axes of size one and joining neighbours, from the last, while their product stays small.

    The first axis, which counts outputs, is never joined, so that a matrix stays one.

    Args:
        shape: Shape of a parameter.
        limit: Largest size of a joined axis; ``None`` keeps the shape as it is.

    Returns:
        At least one axis: ``(1,)`` for one number.

    Example:
        >>> merged_shape((64, 3, 3, 3), 64), merged_shape((8, 1, 4), 32), merged_shape((), 8)
        ((64, 27), (8, 4), (1,))
    """
    if limit is None:
        return tuple(shape)
    sizes = [size for size in shape if size != 1]
    merged: list[int] = []
    for size in reversed(sizes[1:]):
        if merged and merged[0] * size <= limit:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return (*sizes[:1], *merged) or (1,)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows (first axis) and columns (all others) of a parameter seen as one matrix."""
    return shape[0], prod(shape[1:])


def alike(tensors: list[Tensor], limit: int = 2**18) -> list[list[int]]:
    """Places of tensors that may be stacked: of the same shape, type and device, up to a number of entries per stack.

    Stacks save the overhead of many small products; large matrices have none to save, and a stack is a copy.
    """
    kinds: dict[Any, list[list[int]]] = {}
    for place, x in enumerate(tensors):
        stacks = kinds.setdefault((x.shape, x.dtype, x.device), [[]])
        if stacks[-1] and (len(stacks[-1]) + 1) * x.numel() > limit:
            stacks.append([])
        stacks[-1].append(place)
    return [stack for stacks in kinds.values() for stack in stacks]


def blocks(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    """Regions of at most ``size`` along each axis that tile a shape, in row-major order."""
    return product(*(tuple(slice(start, min(start + size, n)) for start in range(0, n, size)) for n in shape))


def gram(x: Tensor, axis: int) -> Tensor:
    r""":math:`X_{(k)} X_{(k)}^\top` of the unfolding along an axis, ``(n_k, n_k)``."""
    unfolded = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return unfolded @ unfolded.mT


def multiply(x: Tensor, matrices: Mapping[int, Tensor], *, transpose: bool = False) -> Tensor:
    """Apply a matrix (or its transpose) along each axis that has one."""
    for axis, matrix in matrices.items():
        matrix = matrix.mT if transpose else matrix
        if axis == x.ndim - 1:
            x = x @ matrix.mT
        elif axis == x.ndim - 2:
            x = matrix @ x
        else:
            x = torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)
    return x


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors in columns; in float64 where the own precision fails.

    Raises:
        SolverError: If both fail.
    """
    try:
        return Eigh().basis(matrix)
    except SolverError:
        values, basis = Eigh().basis(matrix.double())
        return values.to(matrix.dtype), basis.to(matrix.dtype)


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors, each with its largest entry positive, so that no sign depends on the routine.

    Raises:
        SolverError: If the decomposition fails, in float64, too.
    """
    try:
        vectors = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    except RuntimeError as error:
        if matrix.dtype == torch.float64:
            raise SolverError(f"no singular vectors of a matrix of shape {tuple(matrix.shape)}: {error}") from error
        return leading_vectors(matrix.double(), rank).to(matrix.dtype)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).contiguous()


def improved_basis(matrix: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration from the basis of a nearby matrix, columns in their old order."""
    # Gradients of extreme size have factors whose norm leaves the floating range; a basis knows no size.
    size = matrix.diagonal().mean()
    return Subspace().basis(matrix / torch.where(size == 0, 1, size), basis)[1]


def symmetric_power(matrix: Tensor, exponent: float, floor: float) -> Tensor:
    """``Q max(s, floor)^exponent Q^T`` of a positive semi-definite matrix ``Q diag(s) Q^T``."""
    values, basis = spectrum(matrix)
    return (basis * values.clamp(min=floor) ** exponent) @ basis.mT


def rotated_root(second_moment: Tensor, eps: float) -> Tensor:
    r""":math:`\sqrt V + \epsilon` for a second moment in a rotated basis, above the rounding errors of the rotation.

    A gradient of low rank has entries of zero in its own basis, which come out as rounding errors; divided by
    themselves they would be steps in random directions.
    """
    root = second_moment.sqrt()
    return torch.maximum(root, 10 * torch.finfo(root.dtype).eps * root.amax()) + eps
