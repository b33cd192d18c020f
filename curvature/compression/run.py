"""The walk over the layers of a model that quantising and pruning share."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from curvature.compression.factors import LayerCurvature, layer_curvature
from curvature.compression.grid import Codes
from curvature.compression.layers import CalibrationSource, Matrix, matrices, select
from curvature.compression.result import CompressedLayer, Compression
from curvature.matrices.problem import Problem
from solvers import BlockDiagonal
from solvers.outcome.progress import progress_bar


@dataclass(frozen=True)
class Changed:
    """A matrix after compression, with its codes or its mask."""

    value: Tensor
    codes: Codes | None = None
    mask: Tensor | None = None


Change = Callable[[Matrix, Tensor, LayerCurvature], Changed]
#: Decides from all matrices, which it may go through once, how each one is changed.
Plan = Callable[[Sequence[Matrix], Callable[[Matrix], tuple[Tensor, LayerCurvature]]], Change]


def compress(
    model: nn.Module,
    source: CalibrationSource,
    plan: Plan,
    layers: str | Iterable[str] | None,
    embeddings: bool,
    sequential: bool,
    damping: float,
    measure: bool,
) -> Compression:
    """Compress a copy of the model, layer by layer.

    Args:
        model: The model.
        source: Where the curvature comes from.
        plan: Decides how each matrix is changed.
        layers: Which layers.
        embeddings: Whether embeddings count.
        sequential: Whether the curvature of each layer is estimated on the model as it is by then.
        damping: Fraction of the factors' mean diagonals.
        measure: Whether losses are evaluated.
    """
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters())
    chosen = select(copied, source.loss_fn, source.data, layers, embeddings, source.joint, **source.read)
    found = _found(source.of(copied, chosen.parameters), chosen.names)

    def read(matrix: Matrix) -> tuple[Tensor, LayerCurvature]:
        W = matrix.read(parameters)
        if not bool(W.isfinite().all()):
            raise ValueError(f"{matrix.name} holds NaN or infinity; the model cannot be compressed as it is.")
        return W, layer_curvature(matrix.name, matrix.operator, damping)

    change = plan(found, read)
    rows: list[CompressedLayer] = []
    codes: dict[str, Codes] = {}
    masks: dict[str, Tensor] = {}
    with progress_bar(len(found), "layers", source.progress) as bar:
        for index, matrix in enumerate(found):
            if sequential and rows:
                matrix = found[index] = _again(matrix, source.of(copied, matrix.block.names))
            W, own = read(matrix)
            start = time.perf_counter()
            changed = change(matrix, W, own)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                matrix.write(changed.value, parameters)
            rows.append(_row(matrix, W, matrix.read(parameters), own, changed, seconds))
            if changed.codes is not None:
                codes[matrix.name] = changed.codes
            if changed.mask is not None:
                masks[matrix.name] = changed.mask
            bar.update()
    if not measure:
        return Compression(copied, tuple(rows), codes=codes, masks=masks)
    before, after = loss_of(model, source), loss_of(copied, source)
    increases = _one_by_one(model, copied, found, source, before)
    rows = [replace(row, measured=increase) for row, increase in zip(rows, increases, strict=True)]
    return Compression(copied, tuple(rows), before, after, codes, masks)


def _found(op: BlockDiagonal, names: Iterable[str]) -> list[Matrix]:
    """The matrices of the blocks of these names, all of them."""
    found = list(matrices(op, names))
    if missing := set(names) - {matrix.block.name for matrix in found}:
        raise ValueError(
            f"the curvature has no block {', '.join(sorted(missing))}: it was estimated with another bias= or for "
            "other parameters. Leave those out with layers=, or give a structure by name."
        )
    return found


def _again(matrix: Matrix, op: BlockDiagonal) -> Matrix:
    """The same matrix with its curvature in another operator."""
    return next(other for other in matrices(op, [matrix.block.name]) if other.index == matrix.index)


def _row(
    matrix: Matrix, W: Tensor, value: Tensor, curvature: LayerCurvature, changed: Changed, seconds: float
) -> CompressedLayer:
    """What is known of a matrix W that became ``value``, as the model holds it."""
    d_in = W.shape[1] - matrix.free
    return CompressedLayer(
        name=matrix.name,
        shape=(W.shape[0], d_in),
        bits=None if changed.codes is None else changed.codes.bits,
        kept=float((value[:, :d_in] != 0).double().mean()),
        predicted=curvature.increase(W - value),
        measured=None,
        damping=curvature.damping,
        singular=curvature.singular,
        seconds=seconds,
    )


def _one_by_one(
    model: nn.Module, compressed: nn.Module, found: Sequence[Matrix], source: CalibrationSource, before: float
) -> list[float]:
    """The increase of the loss with each matrix alone compressed."""
    alone = copy.deepcopy(model)
    own, original, new = (dict(m.named_parameters()) for m in (alone, model, compressed))
    increases = []
    with torch.no_grad(), progress_bar(len(found), "losses of single layers", source.progress) as bar:
        for matrix in found:
            matrix.write(matrix.read(new), own)
            increases.append(loss_of(alone, source) - before)
            matrix.write(matrix.read(original), own)
            bar.update()
    return increases


def loss_of(model: nn.Module, source: CalibrationSource) -> float:
    """The loss of a model over the data."""
    problem = Problem(model, source.loss_fn, source.data, **source.read)
    losses: list[Tensor] = []
    divisor = problem.visit(lambda evaluation: losses.append(evaluation.loss().detach().double()), "loss")
    return float(sum(losses) / divisor)
