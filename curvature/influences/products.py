"""Inner products of the gradients of examples with the rows of queries, from the samples of a layer.

Axes: ``q`` query, ``*`` stack (groups of a grouped layer), ``n`` example, ``s`` position, ``o`` output, ``i`` input,
``r`` rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.influences.rows import BlockRows, Truncated
from curvature.layers.samples import CHUNK_ELEMENTS, OneHot, Outer, Samples
from solvers.precision import widen


def by_example(samples: Samples, rows: BlockRows) -> Tensor:
    """Inner products ``(Q, n)`` of the per-sample gradients with rows ``(Q, *block)``."""
    if _positions_are_cheaper(samples, rows):
        split = by_position(samples, rows)
        if split is not None:
            return split.sum(-1)
    if isinstance(rows, Tensor):
        return _with_gradients(samples, rows)
    step = max(1, CHUNK_ELEMENTS // max(1, torch.Size(samples.block_shape).numel()))
    parts = [rows.dense(slice(start, start + step)) for start in range(0, len(rows), step)]
    return torch.cat([_with_gradients(samples, part) for part in parts])


def by_position(samples: Samples, rows: BlockRows) -> Tensor | None:
    """Inner products ``(Q, n, s)`` at each position; ``None`` where the uses do not keep positions apart."""
    uses = samples.uses
    if samples.merge or not all(isinstance(use, Outer) for use in uses):
        return None
    if len({(use.examples, use.positions) for use in uses}) != 1:  # type: ignore[union-attr]
        return None
    total: Tensor | None = None
    for use in uses:
        assert isinstance(use, Outer)
        part = _contracted(use, rows.mT if use.flipped else rows)
        total = part if total is None else total + part
    return total


def _positions_are_cheaper(samples: Samples, rows: BlockRows) -> bool:
    """Whether products cost less than gradients, which are whole tables for embeddings and undo a low rank."""
    outer = [use for use in samples.uses if isinstance(use, Outer)]
    if any(isinstance(use.a, OneHot) for use in outer):
        return True
    if isinstance(rows, Tensor) or not outer:
        return False
    o, i = samples.block_shape[-2:]
    examples, queries, rank = outer[0].examples, len(rows), rows.left.shape[-1]
    positions = sum(use.positions for use in outer)
    apart = queries * examples * positions * rank * (o + i)
    formed = (examples * positions + queries * examples + queries * rank) * o * i
    return apart < formed


def _with_gradients(samples: Samples, rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    return torch.cat([flat @ chunk.flatten(1).to(flat.dtype).T for chunk in samples.gradients()], dim=1)


def _contracted(use: Outer, rows: BlockRows) -> Tensor:
    r""":math:`g_{ns}^\top R_q a_{ns}` for matrices ``R (Q, *, o, i)``: ``(Q, n, s)``, a chunk of examples at a time."""
    queries, stacked = len(rows), use.g.dim() > 4
    width = rows.left.shape[-1] if isinstance(rows, Truncated) else use.g.shape[-1]
    step = max(1, CHUNK_ELEMENTS // max(1, queries * use.positions * width))
    out = []
    for start in range(0, use.examples, step):
        at = slice(start, start + step)
        g = widen(use.g[..., 0, at, :, :])  # (*, n, s, o)
        if isinstance(rows, Truncated):
            left = torch.einsum("q...or,...nso->q...nsr", rows.left, g.to(rows.left.dtype))
            part = (left * _reached(use, rows.right.mT, at)).sum(-1)
        else:
            part = (_reached(use, rows, at) * g.to(rows.dtype)).sum(-1)
        out.append(part.sum(1) if stacked else part)
    return torch.cat(out, dim=1)


def _reached(use: Outer, matrices: Tensor, at: slice) -> Tensor:
    """Matrices ``(Q, *, k, i)`` times the inputs of some examples: ``(Q, *, n, s, k)``."""
    if not isinstance(use.a, OneHot):
        return torch.einsum("q...ki,...nsi->q...nsk", matrices, use.rows[..., at, :, :].to(matrices.dtype))
    reached = matrices.mT[:, use.a.index[at]]
    return reached if use.a.keep is None else reached * use.a.keep[at].unsqueeze(-1)
