"""The Fisher information of a model on a data set."""

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
def fisher(
    model: nn.Module, loss_fn: Any, data: Data, *, structure: Literal["full"] = ..., **options: Unpack[Arguments]
) -> GaussNewtonOperator: ...
@overload
def fisher(
    model: nn.Module, loss_fn: Any, data: Data, *, structure: Structure, **options: Unpack[Arguments]
) -> LinearOperator: ...
@checked(**CHECKS)
def fisher(
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
    r"""Fisher information of the loss over the data, in the given structure.

    With the loss written as :math:`L = w \sum_t l_t` over its terms (one example, one position),

    .. math::
        \text{exact:}\; w \sum_t J_t^\top H_t J_t, \qquad
        \text{mc:}\; w \sum_t \tfrac{1}{M} \sum_m \hat g_{tm} \hat g_{tm}^\top, \qquad
        \text{empirical:}\; w \sum_t g_t g_t^\top .

    where :math:`H_t` is the Fisher information of the outputs under the likelihood :math:`e^{-l_t}`, and the targets do
    not enter but for their weights. For a loss in natural parameters it is the Hessian of :math:`l_t`, and the Fisher
    equals the GGN: for cross-entropy it is the Fisher of the softmax, times the weight of a term; for ``MSELoss``,
    whose output Hessian is ``2 / (N C)``, it is ``2 / C`` times the Fisher of a unit Gaussian. For others it is another
    matrix: ``1 / (p (1 - p))`` under ``BCELoss``, ``1 / (mu + eps)`` under ``PoissonNLLLoss`` of rates, ``diag(1 / v,
    1 / (2 v^2))`` in the mean and variance that a model returns under ``GaussianNLLLoss``, ``diag(p)`` in the
    log-probabilities under ``NLLLoss``, 1 under ``L1Loss`` (of the Laplace distribution). An empirical Fisher uses the
    targets and is not an estimate of the Fisher.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        structure: A name of the table below; a curvature object, with its options, such as
            ``KroneckerFisher(sharing="reduce")``; or ``{rule: structure}`` for parts of the model, see
            :class:`curvature.Mixed`.
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``; by default that of a curvature, and ``"mc"`` for a name.
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
        options: Further options of the structure, in brackets in this table:

            ==============  =========================================================================================
            ``"full"``      matrix-free products (``keep_graph``, ``memory``, ``mode``, see :func:`curvature.hessian`
                            and :func:`curvature.jacobian`)
            ``"dense"``     the whole matrix, P^2 numbers (``memory``)
            ``"low_rank"``  its root, one row per example and signal (``memory``)
            ``"layer"``     a dense matrix per block: weight and bias of a layer (``max_size``)
            ``"unit"``      a dense matrix per output unit of a layer; 2 x 2 for scale and shift (``max_size``)
            ``"diagonal"``  exact diagonal
            ``"kfac"``      Kronecker factors per layer (``sharing``, ``bias``, ``max_dim``, ``max_ratio``)
            ``"ekfac"``     the same with the exact diagonal in their eigenbasis
            ``"tnt"``       Kronecker factors of the gradients themselves (``max_dim``, ``max_ratio``)
            ``"foof"``      Kronecker factors of the inputs alone: no gradients, no scale of the loss
            ==============  =========================================================================================

    Returns:
        Operator on the flat parameter vector.

    Raises:
        ValueError: If the structure or kind is unknown, a curvature says another kind or number of samples than the
            call, the matrix does not fit the memory it may take, or ``resume`` is given for a structure of the whole
            matrix.
        NoLikelihoodError: For ``exact`` and ``mc``, if the loss is no likelihood; :func:`curvature.ggn` needs none.
        CheckpointError: If the file of ``resume`` belongs to another problem.
    """
    request = Request(model, loss_fn, data, params, output, class_dim, progress, batch_dim, process_group)
    return request.matrix(structure, kind_of(structure, kind, "mc"), samples, generator, resume, options, fisher=True)
