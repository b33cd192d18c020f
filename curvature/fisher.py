"""The Fisher information of a model on a data set."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from curvature.data import Data, Output
from curvature.dataset import estimate
from curvature.diagonal import DiagonalFisher
from curvature.eigenbasis import EigenbasisFisher
from curvature.estimator import Curvature
from curvature.kronecker import KroneckerFisher
from curvature.signals import FisherKind
from solvers import LinearOperator

Structure = Literal["kfac", "ekfac", "diagonal"]
#: Structure -> what estimates it. A new structure is one estimator file and one line here.
STRUCTURES: dict[str, type[Curvature]] = {
    "diagonal": DiagonalFisher,
    "kfac": KroneckerFisher,
    "ekfac": EigenbasisFisher,
}


def fisher(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    kind: FisherKind = "mc",
    structure: Structure = "kfac",
    samples: int = 1,
    generator: torch.Generator | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> LinearOperator:
    r"""Fisher information of the loss over the data, in the given structure.

    With the loss written as :math:`L = w \sum_t l_t` over its terms (one example, one position),

    .. math::
        \text{exact:}\; w \sum_t J_t^\top H_t J_t, \qquad
        \text{mc:}\; w \sum_t \tfrac{1}{M} \sum_m \hat g_{tm} \hat g_{tm}^\top, \qquad
        \text{empirical:}\; w \sum_t g_t g_t^\top .

    ``exact`` equals the GGN: for cross-entropy it is the Fisher of the softmax, times the weight of a term; for
    ``MSELoss``, whose output Hessian is ``2 / (N C)``, it is ``2 / C`` times the Fisher of a unit Gaussian. An
    empirical Fisher uses the targets and is not an estimate of the Fisher.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        structure: ``"kfac"``, ``"ekfac"`` or ``"diagonal"``.
        samples: Draws per batch for ``"mc"``.
        generator: Source of the draws; a fresh one seeded with 0 by default.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        progress: Show a progress bar.
        options: Further options of the structure (``sharing=``, ``bias=``).

    Returns:
        Operator on the flat parameter vector.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {sorted(STRUCTURES)}, got {structure!r}.")
    curvature = STRUCTURES[structure](kind, samples, **options)
    return estimate(
        model,
        loss_fn,
        data,
        curvature,
        params=params,
        output=output,
        class_dim=class_dim,
        generator=generator,
        progress=progress,
    )
