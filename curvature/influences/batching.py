"""Queries in groups whose preconditioned gradients fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from curvature.estimation.dataset import examples_along
from curvature.influences.rows import numbers
from curvature.losses import BatchDim
from curvature.model.data import Batch, Data, batch_size, batches, map_tensors
from curvature.model.settings import untouched
from curvature.model.trees import tensors_in
from solvers import BlockDiagonal, LinearOperator


def read(queries: Data, model: nn.Module) -> list[Batch]:
    """All batches of queries, leaving the random state as it is."""
    with untouched(model):
        return list(batches(queries)())


def groups(
    queries: list[Batch], inverse: LinearOperator, rank: int | None, memory: int | None, batch_dim: BatchDim = None
) -> Iterator[list[Batch]]:
    """Consecutive queries whose rows take no more than ``memory`` bytes together.

    Raises:
        ValueError: If a single query takes more, or a batch that does cannot be split.
    """
    if memory is None:
        yield queries
        return
    most = memory // bytes_of_a_query(inverse, rank)
    if most < 1:
        raise ValueError(
            f"the preconditioned gradient of one query takes {bytes_of_a_query(inverse, rank)} bytes, memory= allows "
            f"{memory}. Raise it, restrict the parameters with params=, or keep fewer numbers with query_rank=."
        )
    group: list[Batch] = []
    room = most
    for batch in queries:
        for part in _split(batch, most, batch_dim):
            size = _size(part, batch_dim)
            if size > room:
                yield group
                group, room = [], most
            group.append(part)
            room -= size
    yield group


def bytes_of_a_query(inverse: LinearOperator, rank: int | None) -> int:
    """Memory of a preconditioned gradient."""
    size = inverse.in_shape[0]
    if isinstance(inverse, BlockDiagonal):
        size = sum(numbers(tuple(block.in_shape), rank) for block in inverse.blocks)
    return size * torch.empty(0, dtype=inverse.dtype).element_size()


def _size(batch: Batch, batch_dim: BatchDim) -> int:
    """Number of examples of a batch."""
    return (None if batch_dim is None else examples_along(batch[1], batch_dim)) or batch_size(batch[0]) or 1


def _split(batch: Batch, most: int, batch_dim: BatchDim) -> Iterator[Batch]:
    """A batch in parts of at most so many examples."""
    size = _size(batch, batch_dim)
    if size <= most:
        yield batch
        return
    shapes = {tuple(tensor.shape) for tensor in tensors_in(batch)}
    if batch_dim is not None or any(not shape or shape[0] != size for shape in shapes):
        raise ValueError(
            f"a batch of {size} queries is more than the {most} that memory= allows, and it cannot be split: the first "
            f"axes of its tensors {sorted(shapes)} are not known to be the examples. Give smaller batches of queries, "
            "more memory, or keep fewer numbers with query_rank=."
        )
    for start in range(0, size, most):
        part = partial(_rows, start=start, stop=start + most)
        yield map_tensors(batch[0], part), map_tensors(batch[1], part)


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]
