"""Prune a trained model, guided by its curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.compression.factors import LayerCurvature
from curvature.compression.layers import CHECKS, CalibrationSource, Matrix, parameters_of
from curvature.compression.obs import prune_matrix
from curvature.compression.pattern import Pattern
from curvature.compression.result import Compression
from curvature.compression.run import Change, Changed, compress
from curvature.losses import BatchDim, ClassDim
from curvature.losses.signals import FisherKind
from curvature.matrices.request import Structure
from curvature.model.arguments import checked, count, real
from curvature.model.data import Data, Output
from solvers import BlockDiagonal
from solvers.outcome.arguments import flag


def _check_sparsity(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{name} is empty; it holds a fraction for each parameter.")
        for entry in value.values():
            Pattern.parse(entry)
    elif not Pattern.parse(value).fraction:
        raise ValueError(f"{name}=0 would remove nothing.")
    return value


@checked(
    **CHECKS,
    sparsity=_check_sparsity,
    units=flag,
    rounds=count(),
    rtol=real(low=0.0, high=1.0, open_high=True),
    max_steps=count(),
)
def prune(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    sparsity: float | str | Mapping[str, float | str] = 0.5,
    units: bool = False,
    structure: Structure | BlockDiagonal = "kfac",
    kind: FisherKind | None = None,
    samples: int = 4,
    bias: Literal["joint", "separate"] = "joint",
    rounds: int = 8,
    sequential: bool = False,
    damping: float = 0.01,
    rtol: float = 1e-3,
    max_steps: int = 500,
    layers: str | Iterable[str] | None = None,
    embeddings: bool = False,
    measure: bool = True,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Compression:
    r"""Set weights of a trained model to zero so that its loss rises as little as its curvature allows.

    The optimal brain surgeon on Kronecker factors: weights go whose removal costs least in the quadratic form of their
    layer, :math:`w_{ij}^2 / ([B^{-1}]_{ii} [A^{-1}]_{jj})`, and the others move to the exact minimum of that form. With
    ``"2:4"`` every pattern of a group is tried; with ``structure="foof"`` (no B) rows stand alone, as in SparseGPT.

    Args:
        model: The trained model, in the mode in which it is used; it stays as it is.
        loss_fn: The loss it was trained on.
        data: Calibration data: one batch ``(x, y)`` or a re-iterable of batches.
        sparsity: Share of the weights of each matrix that is removed, or ``"n:m"``: of ``m`` neighbouring inputs, ``n``
            are kept; or ``{parameter: sparsity}``, such as :func:`curvature.allocate` chooses.
        units: Remove whole output units (rows and their biases).
        structure: As for :func:`quantize`.
        kind: Kind of Fisher matrix; ``"mc"`` by default.
        samples: Draws for each batch of ``"mc"``.
        bias: ``"joint"`` moves the bias as well; ``"separate"`` leaves it alone.
        rounds: In how many rounds weights are chosen. Between rounds the others make up for what is gone, which changes
            the costs.
        sequential: Estimate each layer's curvature on the model whose earlier layers are pruned already.
        damping: Fraction of a factor's mean diagonal that is added to it; see :func:`quantize`.
        rtol: Relative residual of the solve for the remaining weights.
        max_steps: Most steps of that solve.
        layers: Names or globs of parameters or modules; by default every weight matrix of a layer.
        embeddings: Also prune embeddings, and heads that are tied to one.
        measure: Evaluate the loss before and after, and with each layer alone.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        generator: Source of the draws; a fresh one seeded with 0 by default.
        progress: Show progress bars.

    Returns:
        The model with zeros, masks, and for each layer the predicted and measured increase of the loss.

    Raises:
        ValueError: If an option is out of range, or the inputs of a layer are no multiple of m.
        SolverError: If a layer's curvature is not finite, zero or indefinite.
    """
    given: Mapping[str, float | str] = sparsity if isinstance(sparsity, Mapping) else {}
    rest = 0.0 if isinstance(sparsity, Mapping) else sparsity
    if given and layers is None:
        layers = parameters_of(given)
    source = CalibrationSource(
        loss_fn, data, structure, kind, samples, bias, output, class_dim, batch_dim, generator, progress
    )

    def plan(found: Sequence[Matrix], read: object) -> Change:
        patterns = {matrix.name: Pattern.parse(matrix.choice(given, rest), units) for matrix in found}
        inputs = {matrix.name: matrix.block.shape[-1] - matrix.free for matrix in found}
        uneven = {name: d for name, d in inputs.items() if (m := patterns[name].m) is not None and d % m}
        if uneven:
            raise ValueError(
                f"sparsity={sparsity!r} needs inputs in groups of m, but "
                f"{', '.join(f'{name} has {d}' for name, d in uneven.items())}. Leave these out with layers=."
            )

        def change(matrix: Matrix, W: Tensor, curvature: LayerCurvature) -> Changed:
            value, mask = prune_matrix(W, curvature, patterns[matrix.name], matrix.free, rounds, rtol, max_steps)
            return Changed(value, mask=mask[:, : inputs[matrix.name]])

        return change

    return compress(model, source, plan, layers, embeddings, sequential, damping, measure)
