"""The generalised Gauss-Newton matrix of a loss over a data set."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import nn

from curvature.estimation.checkpoint import Resume
from curvature.losses import BatchDim, ClassDim
from curvature.losses.signals import FisherKind
from curvature.matrices.full import GaussNewtonOperator
from curvature.matrices.request import CHECKS, Arguments, Request, Structure
from curvature.model.arguments import checked
from curvature.model.data import Data, Output
from curvature.structures.by_name import kind_of
from solvers import LinearOperator


@overload
def ggn(
    model: nn.Module, loss_fn: Any, data: Data, *, structure: Literal["full"] = ..., **options: Unpack[Arguments]
) -> GaussNewtonOperator: ...
@overload
def ggn(
    model: nn.Module, loss_fn: Any, data: Data, *, structure: Structure, **options: Unpack[Arguments]
) -> LinearOperator: ...
@checked(**CHECKS)
def ggn(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    structure: Structure = "full",
    kind: FisherKind | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    resume: Resume | None = None,
    progress: bool | None = None,
    process_group: Any = None,
    **options: Any,
) -> LinearOperator:
    r"""Generalised Gauss-Newton matrix of the loss over the data, in the given structure.

    With the loss written as :math:`L = w \sum_t l_t(z_t)` over its terms,

    .. math:: G = w \sum_t J_t^\top \nabla^2_{z} l_t \, J_t,

    the Hessian of L with the model replaced by its linearisation. It equals the exact Fisher where the loss is a
    negative log-likelihood in its natural parameter; :func:`curvature.fisher` gives the constants, the structures and
    all arguments.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        structure: ``"full"`` is matrix-free; see :func:`curvature.fisher` for the others.
        kind: ``"exact"``, or ``"mc"`` for an unbiased estimate from draws of the model's own distribution; by default
            that of a curvature, and ``"exact"`` for a name.
        samples: Draws per batch for ``"mc"``; by default those of a curvature, and 1 for a name.
        generator: Source of the draws; a fresh one seeded with 0 by default.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open; by key for a sum of losses.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        resume: File in which the sums over the batches are kept as they grow, and from which a run that was killed
            continues at its batch, with the identical result. A path, or a :class:`curvature.Checkpoint`, that says how
            often to save.
        progress: Show a progress bar.
        process_group: Processes whose data together are the data, see :func:`curvature.hessian`.
        options: Options of the structure.

    Returns:
        Operator on the flat parameter vector, symmetric; positive semi-definite where the loss is convex in the output.

    Raises:
        ValueError: If the structure or kind is unknown.

    References:
        Schraudolph (2002), "Fast curvature matrix-vector products"; Martens (2020), https://arxiv.org/abs/1412.1193
    """
    chosen = kind_of(structure, kind, "exact")
    if chosen == "empirical":
        raise ValueError(
            "kind must be 'exact' or 'mc', got 'empirical'. The empirical Fisher is no Gauss-Newton matrix; it is "
            "curvature.fisher(..., kind='empirical')."
        )
    request = Request(model, loss_fn, data, params, output, class_dim, progress, batch_dim, process_group)
    return request.matrix(structure, chosen, samples, generator, resume, options)
