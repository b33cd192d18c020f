"""Preconditioned query gradients, whole or by their leading singular vectors.

Axes: ``q`` query, ``*`` stack (groups of a grouped layer), ``o`` output, ``i`` input, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.matrices.examples import Examples
from curvature.matrices.problem import Evaluation, Problem
from solvers import BlockDiagonal, LinearOperator, Place
from solvers.operators.decompositions import singular_value_decomposition


@dataclass(frozen=True, eq=False)
class Truncated:
    """Matrices ``L R^T`` of low rank.

    Attributes:
        left: ``(Q, *, o, r)``.
        right: ``(Q, *, i, r)``.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrices: Tensor, rank: int) -> Truncated:
        """The nearest matrices of that rank to ``(Q, *, o, i)``, in Frobenius norm."""
        U, s, Vh = singular_value_decomposition(matrices)
        return cls((U * s.unsqueeze(-2))[..., :rank].contiguous(), Vh.mT[..., :rank].contiguous())

    @property
    def mT(self) -> Truncated:
        """The transposed matrices."""
        return Truncated(self.right, self.left)

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.left)

    @property
    def stored(self) -> int:
        """Numbers kept for a query."""
        return (self.left.numel() + self.right.numel()) // max(1, len(self))

    def dense(self, queries: slice = slice(None)) -> Tensor:
        """The matrices themselves, ``(Q, *, o, i)``."""
        return self.left[queries] @ self.right[queries].mT


#: The preconditioned gradients of all queries in one block: ``(Q, *block)``, or matrices of low rank.
BlockRows = Tensor | Truncated


@dataclass(frozen=True, eq=False)
class QueryRows:
    """The preconditioned gradients of all queries.

    Attributes:
        number: How many.
        flat: ``(Q, P)``, if they are kept whole.
        pieces: Otherwise those of each block.
        dropped: Frobenius norms of what truncation took from each query, ``{block name: (Q,)}``.
        kept: Norms of what is left.
    """

    number: int
    flat: Tensor | None
    pieces: Mapping[Place, BlockRows]
    dropped: dict[str, Tensor]
    kept: dict[str, Tensor]

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the rows."""
        if self.flat is not None:
            return self.flat
        first = next(iter(self.pieces.values()))
        return first if isinstance(first, Tensor) else first.left

    def at(self, place: Place) -> BlockRows:
        """The rows of one block."""
        if place in self.pieces:
            return self.pieces[place]
        return place.gather(self._whole() if self.flat is None else self.flat)

    def _whole(self) -> Tensor:
        """All rows ``(Q, P)`` from their pieces: for a pass whose blocks differ from those of the curvature."""
        pieces = {place: rows if isinstance(rows, Tensor) else rows.dense() for place, rows in self.pieces.items()}
        out = self.like.new_zeros(self.number, sum(rows[0].numel() for rows in pieces.values()))
        for place, rows in pieces.items():
            place.scatter(rows, out)
        return out


def precondition(queries: Problem, inverse: LinearOperator, rank: int | None) -> QueryRows:
    """The gradients of the queries times the inverse.

    Args:
        queries: Their losses.
        inverse: Acts on the flat vector; block-diagonal if there is a rank.
        rank: Singular values to keep of every matrix; ``None`` for all.
    """
    if rank is None:
        rows: list[Tensor] = []
        for_gradients(queries, "queries", lambda gradients: rows.append(inverse @ gradients.to(inverse.dtype)))
        flat = torch.cat(rows)
        return QueryRows(len(flat), flat, {}, {}, {})
    assert isinstance(inverse, BlockDiagonal)
    kept: dict[Place, list[BlockRows]] = {place: [] for place in inverse.places}
    lost: dict[Place, list[Tensor]] = {place: [] for place in inverse.places}
    number = 0

    def add(gradients: Tensor) -> None:
        nonlocal number
        number += len(gradients)
        for place, block in zip(inverse.places, inverse.blocks, strict=True):
            rows = block @ place.gather(gradients).to(inverse.dtype)
            short = truncated(rows, rank)
            kept[place].append(short)
            lost[place].append(_norms(rows - (short if isinstance(short, Tensor) else short.dense())))

    for_gradients(queries, "queries", add)
    pieces = {place: _joined(parts) for place, parts in kept.items()}
    return QueryRows(
        number,
        None,
        pieces,
        {_name(place): torch.cat(norms) for place, norms in lost.items()},
        {
            _name(place): _norms(rows if isinstance(rows, Tensor) else rows.left)  # orthonormal on the right
            for place, rows in pieces.items()
        },
    )


def truncated(rows: Tensor, rank: int) -> BlockRows:
    """QueryRows of a block ``(Q, *block)`` by their leading singular vectors, or whole where these would take more."""
    return Truncated.of(rows, rank) if _gains(tuple(rows.shape[1:]), rank) else rows.clone()


def numbers(shape: tuple[int, ...], rank: int | None) -> int:
    """Numbers that are kept for a query in a block of this shape."""
    size = torch.Size(shape).numel()
    if rank is None or not _gains(shape, rank):
        return size
    o, i = shape[-2:]
    return size // (o * i) * rank * (o + i)


def _gains(shape: tuple[int, ...], rank: int) -> bool:
    return len(shape) >= 2 and rank * (shape[-2] + shape[-1]) < shape[-2] * shape[-1]


def for_gradients(problem: Problem, title: str, use: Callable[[Tensor], object]) -> None:
    """Hand over the per-sample gradients of every batch, ``(n, P)``."""

    def visit(evaluation: Evaluation) -> None:
        use(gradients_of(evaluation))

    problem.visit(visit, title, recorded=True, every=True)


def gradients_of(evaluation: Evaluation) -> Tensor:
    """The per-sample gradients of a batch, ``(n, P)``."""
    examples = Examples.of(evaluation)
    return examples.gradients([examples.terms.gradient()])[0]


def _joined(parts: list[BlockRows]) -> BlockRows:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    pairs = [part for part in parts if isinstance(part, Truncated)]
    return Truncated(torch.cat([part.left for part in pairs]), torch.cat([part.right for part in pairs]))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)


def _name(place: Place) -> str:
    return str(getattr(place, "name", place))
