"""Round the weights of a trained model, guided by its curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.compression.allocation import allocate_matrices
from curvature.compression.factors import LayerCurvature
from curvature.compression.grid import Codes, Fit, Grid, Group, Levels, check_bits
from curvature.compression.layers import CHECKS, CalibrationSource, Matrix, parameters_of
from curvature.compression.result import Compression
from curvature.compression.rounding import round_matrix
from curvature.compression.run import Change, Changed, compress
from curvature.losses import BatchDim, ClassDim
from curvature.losses.signals import FisherKind
from curvature.matrices.request import Structure
from curvature.model.arguments import checked, one_of
from curvature.model.data import Data, Output
from solvers import BlockDiagonal
from solvers.outcome.arguments import flag, number

Order = Literal["activation", "position"]


def _check_bits(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        for layer, bits in value.items():
            check_bits(f"{name}[{layer!r}]", bits)
        return value
    return number(name, value, low=1.0, high=16.0, unit="Or {parameter: bits}.")


def _check_group(name: str, value: Any) -> Any:
    Grid(group=value)
    return value


@checked(
    **CHECKS,
    bits=_check_bits,
    symmetric=flag,
    group=_check_group,
    fit=one_of(Fit),
    order=one_of(Order),
)
def quantize(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    bits: float | Mapping[str, int] = 4,
    structure: Structure | BlockDiagonal = "kfac",
    kind: FisherKind | None = None,
    samples: int = 4,
    symmetric: bool = True,
    group: Group = "row",
    fit: Fit = "error",
    order: Order = "activation",
    bias: Literal["joint", "separate"] = "joint",
    sequential: bool = False,
    damping: float = 0.01,
    layers: str | Iterable[str] | None = None,
    embeddings: bool = False,
    measure: bool = True,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Compression:
    r"""Quantise a trained model so that its loss rises as little as its curvature allows.

    For each weight matrix W the rounding error :math:`E = W - \hat W` is kept small in the quadratic form
    :math:`\tfrac12 \operatorname{tr}(B E A E^\top)` of the layer's curvature: weights are rounded one after another,
    and those that are still to come make up for the errors so far. With ``structure="foof"`` (A alone, the second
    moment of the layer's inputs) this is GPTQ; with ``"kfac"`` errors of different output units balance each other as
    well, by B, the second moment of the gradients there.

    Args:
        model: The trained model, in the mode in which it is used (``model.eval()``); it stays as it is.
        loss_fn: The loss it was trained on.
        data: Calibration data: one batch ``(x, y)`` or a re-iterable of batches.
        bits: Bits per weight, 1 to 16; a number that is not whole is distributed over the layers by
            :func:`curvature.compression.allocate`; or ``{parameter: bits}``.
        structure: ``"kfac"``, ``"ekfac"``, ``"foof"`` or ``"diagonal"``, with options as a curvature object; or an
            operator of :func:`curvature.fisher` or :func:`curvature.ggn` in one of these structures.
        kind: Kind of Fisher matrix, see :func:`curvature.fisher`; ``"mc"`` by default, which needs no targets.
        samples: Draws for each batch of ``"mc"``.
        symmetric: Whether the grid has zero in its middle; see :class:`~curvature.compression.Grid`.
        group: What shares a scale: ``"row"``, ``"tensor"`` or a number of neighbouring inputs.
        fit: How scales are chosen, ``"error"`` or ``"range"``.
        order: ``"activation"`` rounds the inputs with the largest second moment last, when nothing can go wrong any
            more with the others; ``"position"`` goes from the last input to the first.
        bias: ``"joint"`` moves the layer's bias, which stays off the grid, so as to make up for the rounding;
            ``"separate"`` leaves it alone.
        sequential: Estimate each layer's curvature on the model whose earlier layers are compressed already, which
            costs an estimate per layer; otherwise one estimate serves all.
        damping: Fraction of a factor's mean diagonal that is added to it. Where a factor cannot be factorised with so
            much, more is taken, with a warning and in the result; it never falls back to plain rounding.
        layers: Names or globs of parameters or modules to quantise; by default every weight matrix of a layer.
        embeddings: Also quantise embeddings, and heads that are tied to one.
        measure: Evaluate the loss before and after, and with each layer alone: a pass over the data for each.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        generator: Source of the draws; a fresh one seeded with 0 by default.
        progress: Show progress bars.

    Returns:
        The model with rounded weights, and for each layer codes, predicted and measured increase of the loss.

    Raises:
        ValueError: If an option is out of range, or a name fits no layer.
        StructureError: If the structure has no factors of inputs and outputs.
        SolverError: If a layer's curvature is not finite, zero or indefinite.

    References:
        Frantar et al. (2022), "GPTQ", https://arxiv.org/abs/2210.17323; Tseng et al. (2025), "Model-preserving adaptive
        rounding", https://arxiv.org/abs/2505.22988
    """
    source = CalibrationSource(
        loss_fn, data, structure, kind, samples, bias, output, class_dim, batch_dim, generator, progress
    )
    chosen: Mapping[str, int] = {}
    share, whole = None, 4
    if isinstance(bits, Mapping):
        chosen = bits
        layers = parameters_of(bits) if layers is None else layers
    elif float(bits).is_integer():
        whole = int(bits)
    else:
        share = float(bits)
    grid = Grid(whole, symmetric, group, fit)
    by_activation = order == "activation"

    def plan(found: Sequence[Matrix], read: Callable[[Matrix], tuple[Tensor, LayerCurvature]]) -> Change:
        own = chosen
        if share is not None:
            own = allocate_matrices(found, read, share, grid, by_activation).bits
        grids = {matrix.name: replace(grid, bits=matrix.choice(own, grid.bits)) for matrix in found}

        def change(matrix: Matrix, W: Tensor, curvature: LayerCurvature) -> Changed:
            return quantize_matrix(W, curvature, grids[matrix.name], matrix.free, by_activation)

        return change

    return compress(model, source, plan, layers, embeddings, sequential, damping, measure)


def quantize_matrix(W: Tensor, curvature: LayerCurvature, grid: Grid, free: int, by_activation: bool) -> Changed:
    """Round one matrix ``(d_out, d_in + free)``."""
    d_in = W.shape[1] - free
    levels = grid.levels(W[:, :d_in], curvature.importance[:, :d_in])
    rounded = round_matrix(W, levels, curvature, free, by_activation)
    return Changed(rounded, codes=_codes(rounded[:, :d_in], levels, grid))


def _codes(rounded: Tensor, levels: Levels, grid: Grid) -> Codes:
    d_in = rounded.shape[1]
    size = grid.size(d_in)
    first = slice(0, d_in, size)
    dtype = torch.uint8 if grid.bits <= 8 else torch.int32
    scale, zero = levels.scale[:, first].contiguous(), levels.zero[:, first].contiguous()
    return Codes(levels.codes(rounded).to(dtype), scale, zero, grid.bits, size)
