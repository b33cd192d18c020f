"""The covariance of the gradients of loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvature.losses import BatchDim, ClassDim
from curvature.matrices.problem import Evaluation, Problem, gradient_of, refuse_sums
from curvature.matrices.request import CHECKS, Request, Structure
from curvature.model.arguments import checked
from curvature.model.data import Data, Output
from curvature.structures.blocks import BLOCKS
from solvers import BlockDiagonal, Dense, Diagonal, Flattened, LinearOperator, LowRank
from solvers.outcome.arguments import flag
from solvers.precision import working_dtype

#: Structures that hold the rank-one difference between the centered covariance and the second moment.
CENTERED = ("full", "dense", "layer", "unit", "diagonal")


@checked(**CHECKS, centered=flag)
def gradient_covariance(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    centered: bool = True,
    structure: Structure = "full",
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    progress: bool | None = None,
    process_group: Any = None,
    **options: Any,
) -> LinearOperator:
    r"""Second moment of the gradients of the loss terms around their mean, or around zero.

    With the loss written as :math:`L = w \sum_{t=1}^T l_t` over its T valid terms (one example, one position),
    :math:`g_t = \nabla_\theta l_t` and :math:`\bar g = \frac{1}{T} \sum_t g_t`,

    .. math:: C = w \sum_t (g_t - \bar g)(g_t - \bar g)^\top, \qquad C_\text{uncentered} = w \sum_t g_t g_t^\top .

    The uncentered one is the empirical Fisher, in its scale. For ``CrossEntropyLoss`` with ``reduction="mean"``
    :math:`w = 1/T`, so C is the covariance of the terms' gradients; for ``MSELoss``, which divides by the number of
    entries, it is :math:`1/C` of it.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        centered: Subtract the mean gradient.
        structure: As for :func:`curvature.fisher`, curvatures being of kind ``"empirical"``; ``"full"``, ``"dense"``,
            ``"layer"``, ``"unit"`` or ``"diagonal"`` where centered, since the others do not hold the rank-one
            difference.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open; by key for a sum of losses.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        progress: Show a progress bar.
        process_group: Processes whose data together are the data, see :func:`curvature.hessian`.
        options: Options of the structure.

    Returns:
        Symmetric positive semi-definite operator on the flat parameter vector.

    Raises:
        ValueError: If the structure cannot be centered.
    """
    if centered and not _can_be_centered(structure):
        raise ValueError(
            f"structure={structure!r} cannot be centered: the difference is no longer of that structure. Pass "
            f"centered=False, or one of {', '.join(map(repr, CENTERED))}."
        )
    request = Request(model, loss_fn, data, params, output, class_dim, progress, batch_dim, process_group)
    uncentered = request.matrix(structure, "empirical", options=options)
    if not centered:
        return uncentered
    problem = request.problem()
    refuse_sums(problem)
    return _minus_outer(uncentered, _root_of_mean(problem).to(uncentered.dtype))


def _can_be_centered(structure: Any) -> bool:
    if isinstance(structure, Mapping):
        return all(map(_can_be_centered, structure.values()))
    return structure in CENTERED or type(structure) in [BLOCKS[name] for name in CENTERED if name in BLOCKS]


def _root_of_mean(problem: Problem) -> Tensor:
    r"""The vector :math:`\sqrt{w T}\, \bar g` ``(P,)``, whose outer product is subtracted by centering."""
    p = problem.parameters
    total = torch.zeros(p.size, dtype=working_dtype(p), device=p.device)
    terms = torch.zeros((), dtype=total.dtype, device=p.device)

    def add(evaluation: Evaluation) -> None:
        assert evaluation.terms is not None
        total.add_(p.flatten(gradient_of(evaluation.output, p, evaluation.terms.gradient())))
        terms.add_(evaluation.terms.mask.sum())

    divisor = problem.visit(add, "mean gradient")
    problem.shares.sum(total, terms)
    return total / (terms * divisor) ** 0.5


def _minus_outer(op: LinearOperator, r: Tensor) -> LinearOperator:
    """``op - r r^T`` within the structure of ``op``; ``r`` is shaped as what it acts on."""
    match op:
        case BlockDiagonal():
            pairs = zip(op.blocks, op.places, strict=True)
            blocks = tuple(_minus_outer(block, place.gather(r)) for block, place in pairs)
            return BlockDiagonal(blocks, op.places, op.size)
        case Flattened():
            return op.wrap(_minus_outer(op.op, r.flatten()))
        case Dense():
            return Dense(op.matrix - r.unsqueeze(-1) * r.unsqueeze(-2))
        case Diagonal():
            return Diagonal(op.values - r.square())
    return op - LowRank(r.unsqueeze(0))
