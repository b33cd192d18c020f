"""The functions: from a model, its training data and queries to influences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.checkpoint import Checkpoint, Resume, problem_identity
from curvature.influences.batching import groups, read
from curvature.influences.result import Influence
from curvature.influences.rows import QueryRows, gradients_of, precondition
from curvature.influences.scores import Found, scores, walk
from curvature.influences.store import InfluenceStore, batches_digest, operator_digest
from curvature.layers.block import BlockPlace
from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.matrices.problem import Evaluation, Problem, refuse_sums
from curvature.matrices.request import WHOLE, Request, Structure
from curvature.model.arguments import Check, a, checked, count, data, optional
from curvature.model.data import Batch, Data, Output
from curvature.model.order import refuse_another_order
from curvature.model.shares import Shares
from curvature.structures.by_name import BLOCKS, kind_of
from curvature.structures.estimator import Curvature
from solvers import CG, BlockDiagonal, Damping, LinearOperator, RelativeTikhonov, Solver, StructureError, Tikhonov
from solvers.outcome.arguments import choice, flag, instance, number


def _check_curvature(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return choice(name, value, (*BLOCKS, *WHOLE))
    kinds = (Curvature, Mapping, LinearOperator)
    return instance(name, value, kinds, "the name of a structure, a Curvature, a mapping or a LinearOperator")


def _files(store: Resume | None, process_group: Any) -> InfluenceStore | None:
    if store is not None and process_group is not None:
        raise ValueError("store keeps the files of one process: leave it out, or process_group.")
    return None if store is None else InfluenceStore(store)


def _check_damping(name: str, value: Any) -> Any:
    return value if value is None or isinstance(value, Damping) else number(name, value, low=0.0)


#: Checks of what both functions take beside the names that all functions share.
_CHECKS: dict[str, Check] = {
    "loss_fn": check_loss,
    "train": data,
    "curvature": _check_curvature,
    "damping": _check_damping,
    "solver": optional(a(Solver, "a solver such as CG()")),
    "store": optional(a((str, os.PathLike, Checkpoint), "a folder or a Checkpoint of it")),
}


@checked(
    **_CHECKS,
    queries=data,
    query_loss=optional(check_loss),
    by_position=flag,
    query_rank=optional(count()),
    memory=optional(count()),
)
def influence(
    model: nn.Module,
    loss_fn: Any,
    train: Data,
    queries: Data,
    *,
    curvature: LinearOperator | Structure = "ekfac",
    damping: float | Damping | None = None,
    solver: Solver | None = None,
    query_loss: Any = None,
    by_position: bool = False,
    query_rank: int | None = None,
    memory: int | None = None,
    store: Resume | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    process_group: Any = None,
) -> Influence:
    r"""Influence of training examples on queries, at a minimum of the training loss L.

    If example n is given the additional weight :math:`\epsilon`, the minimum moves by
    :math:`-\epsilon\, H^{-1} g_n`, and the loss of a query by :math:`-\epsilon\, \langle g_q, H^{-1} g_n \rangle`, with
    the gradients g of the summed terms of an example (as :func:`per_sample_gradients`, without the 1/N of a mean loss).
    Networks are rarely at a minimum; with the damped Gauss-Newton matrix in place of H the score is that of the
    proximal step of Bae et al. (2022), which stays meaningful.

    Queries are preconditioned, Q vectors as long as the parameters; training examples are streamed, in chunks of
    gradients that are formed layer by layer. Masked targets (``ignore_index``) are left out, also of the curvature.

    Args:
        model: The trained model; evaluated in its current mode.
        loss_fn: The training loss.
        train: One batch ``(x, y)`` or a re-iterable of batches.
        queries: One batch or an iterable of batches.
        curvature: A structure of :func:`fisher`, estimated from ``train`` (with sampled labels where it is given by
            name); or any operator on the flat vector of parameters, such as one that was saved by
            :func:`solvers.state`, or a matrix known by its products: ``curvature.ggn(model, loss_fn, train)``. With
            sampled labels the eigenvalues of ``"ekfac"`` are squares of gradients summed over all tokens of a sequence.
        damping: How to damp it; a number is a shift in units of C. ``None`` takes a tenth of each block's mean
            eigenvalue, where the matrix has one to show; give a number for a matrix known by its products.
        solver: How to invert the damped matrix, such as ``CG(preconditioner=...)``, ``MINRES()`` for an indefinite
            Hessian, or ``Neumann()``, the recursion of LiSSA. ``None`` takes the exact inverse of the structure, and
            conjugate gradients where there is none; a solve that does not reach its tolerance says so.
        query_loss: Loss of the queries, where it is not ``loss_fn``.
        by_position: Also split the scores by the positions of the training examples.
        query_rank: Keep only so many singular values of the preconditioned gradient of each query and matrix:
            ``r (o + i)`` numbers in place of ``o i``. The result says what that dropped.
        memory: Bytes that preconditioned gradients of queries may take. More queries go in groups, each of which costs
            a pass over the training data.
        store: Folder in which everything is kept as it grows, and from which a run that was killed goes on where it
            was, to the identical result; or a :class:`curvature.Checkpoint` of its path, which says how often to save.
            The curvature is used again for other queries; in the folder, ``curvature.pt`` holds it for
            :func:`solvers.from_state`.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        generator: Source of sampled labels.
        progress: Show progress bars.
        process_group: Processes whose training data together are the data that the curvature is estimated from. Each
            gets the scores of its own examples; the queries are the same in all of them. Without ``store``.

    Raises:
        ValueError: If the operator does not act on the flat vector of the parameters, a rank is asked for and it has
            no blocks, a query does not fit into ``memory``, or the data come in another order in each pass.
        StructureError: If the solver does not serve it.
        CheckpointError: If the files in ``store`` are of another model, other data or other options.
        RuntimeError: If a further pass over the training data gave other examples.

    References:
        Koh and Liang (2017), https://arxiv.org/abs/1703.04730; Bae et al. (2022), https://arxiv.org/abs/2209.05364;
        Grosse et al. (2023), https://arxiv.org/abs/2308.03296, whose section 3.2.2 truncates queries
    """
    refuse_another_order(train, "influences")
    refuse_another_order(queries, "influences")
    request = Request(model, loss_fn, train, params, output, class_dim, progress, batch_dim)
    files = _files(store, process_group)
    shared = replace(request, process_group=process_group)
    matrix, damped = _curvature(shared, curvature, damping, generator, files)
    inverse = _inverse(matrix, damped, solver)
    _check_rank(query_rank, inverse)
    joint = _joint(inverse)
    identity: dict[str, Any] = {}
    if files is not None:
        identity = problem_identity(model, loss_fn, request.problem().parameters, batch_dim) | {
            "curvature": operator_digest(matrix),
            "damping": repr(damped),
            **({} if solver is None else {"solver": repr(solver)}),
            "query loss": None if query_loss is None else problem_identity(model, query_loss)["loss"],
            "by_position": by_position,
            "query_rank": query_rank,
        }
    found: list[tuple[QueryRows, Found]] = []
    for group in groups(read(queries, model), inverse, query_rank, memory, batch_dim):
        asked = _asked(replace(request, loss_fn=loss_fn if query_loss is None else query_loss), group)
        _check(inverse, asked)
        rows = precondition(asked, inverse, query_rank)
        problem = request.problem()
        title = "influence"
        if found:
            problem.random = found[0][1].random  # a loader that shuffles must give the same order
            title = f"influence, queries from {sum(rows.number for rows, _ in found) + 1}"
        file = None if files is None else files.results("scores", identity | {"queries": batches_digest(group)})
        found.append((rows, scores(problem, asked, rows, by_position, joint, file, title)))
        _compare(found[0][1], found[-1][1])
    result = _result(found)
    if not found[0][1].mean:
        return result
    return replace(result, total=sum(Shares(process_group).gather(result.total)))


@checked(**_CHECKS)
def self_influence(
    model: nn.Module,
    loss_fn: Any,
    train: Data,
    *,
    curvature: LinearOperator | Structure = "ekfac",
    damping: float | Damping | None = None,
    solver: Solver | None = None,
    store: Resume | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Influence of every training example on itself, :math:`\langle g_n, (C + \lambda I)^{-1} g_n \rangle`, ``(N,)``.

    Large for examples that the model fits only because it saw them: mislabelled and unusual ones. Arguments as for
    :func:`influence`.
    """
    refuse_another_order(train, "influences")
    request = Request(model, loss_fn, train, params, output, class_dim, progress, batch_dim)
    files = _files(store, process_group)
    shared = replace(request, process_group=process_group)
    matrix, damped = _curvature(shared, curvature, damping, generator, files)
    inverse = _inverse(matrix, damped, solver)
    problem = request.problem()
    _check(inverse, problem)
    file = None
    if files is not None:
        known = {"curvature": operator_digest(matrix), "damping": repr(damped)}
        known |= {} if solver is None else {"solver": repr(solver)}
        file = files.results("self", problem_identity(model, loss_fn, problem.parameters, batch_dim) | known)
    found = Found(problem)

    def visit(evaluation: Evaluation) -> None:
        gradients = gradients_of(evaluation).to(inverse.dtype)
        found.begin(evaluation, len(gradients))
        found.add("all", (gradients * (inverse @ gradients)).sum(1).unsqueeze(0))

    walk(problem, found, visit, "self-influence", file)
    return found.by_block()["all"][0]


def _curvature(
    request: Request,
    curvature: LinearOperator | Structure,
    damping: float | Damping | None,
    generator: torch.Generator | None,
    files: InfluenceStore | None,
) -> tuple[LinearOperator, Damping]:
    """The curvature, and how it is damped."""
    damping = RelativeTikhonov(0.1) if damping is None else damping
    damping = damping if isinstance(damping, Damping) else Tikhonov(damping)
    if isinstance(curvature, LinearOperator):
        return curvature, damping
    keeps = files if not isinstance(curvature, str) or curvature not in WHOLE else None
    resume = None if keeps is None else keeps.factors
    kind = kind_of(curvature, None, "mc")
    made = request.matrix(curvature, kind, generator=generator, resume=resume, fisher=None)
    if keeps is not None:
        keeps.keep(made)
    return made, damping


def _inverse(matrix: LinearOperator, damping: Damping, solver: Solver | None) -> LinearOperator:
    """The inverse of the damped matrix, by its structure or by a solver.

    Raises:
        ValueError: If the damping is a share of the mean eigenvalue, and the matrix is known by its products only.
    """
    if damping.relative:
        try:
            damping(matrix)
        except StructureError as error:
            raise ValueError(
                f"damping={damping!r} is a share of the mean eigenvalue, which {matrix!r} does not show. Pass a "
                "number, in units of the matrix: damping=0.1 * solvers.trace(matrix).value / matrix.shape[0] is a "
                "tenth of an estimate of it."
            ) from error
    if solver is not None:
        return matrix.inverse(damping, solver)
    try:
        return matrix.inverse(damping)
    except StructureError as error:
        if not matrix.symmetric:
            raise StructureError(
                f"{matrix!r} has no inverse by its structure, and it is not known to be symmetric, as a curvature is. "
                "Say symmetric=True where it is a Function, or pass a Dense of its matrix."
            ) from error
        return matrix.inverse(damping, CG(rtol=1e-8 if matrix.dtype == torch.float64 else 1e-5))


def _asked(request: Request, group: list[Batch]) -> Problem:
    """The losses of a group of queries; a model in train mode draws the same random numbers in every run."""
    asked = replace(request, data=group[0] if len(group) == 1 else group).problem()
    asked.random = [torch.Generator().manual_seed(0).get_state()]
    if asked.parameters.device.type == "cuda":
        asked.random.append(torch.Generator(asked.parameters.device).manual_seed(0).get_state())
    return asked


def _joint(inverse: LinearOperator) -> bool:
    """Whether weight and bias of a layer are one block."""
    places = inverse.places if isinstance(inverse, BlockDiagonal) else ()
    parts = [len(place.block.parts) for place in places if isinstance(place, BlockPlace)]
    return not parts or max(parts) > 1


def _check(inverse: LinearOperator, problem: Problem) -> None:
    size = problem.parameters.size
    if inverse.in_shape != (size,):
        raise ValueError(
            f"the curvature acts on {inverse.in_shape}, the model has {size} parameters that count. Pass the same "
            "params= to both, and an operator on the flat vector, as curvature.ggn returns it."
        )
    refuse_sums(problem)


def _check_rank(rank: int | None, inverse: LinearOperator) -> None:
    if rank is None:
        return
    if not isinstance(inverse, BlockDiagonal):
        raise ValueError(
            f"query_rank={rank} truncates the matrices of the blocks of a curvature, and {inverse!r} has no blocks. "
            'Take a structure such as "ekfac", or leave query_rank out.'
        )


def _compare(first: Found, other: Found) -> None:
    """Raise if another group of queries saw other training examples."""
    losses = torch.tensor(first.losses), torch.tensor(other.losses)
    # The same numbers up to the rounding of kernels that are not deterministic; other examples have other losses.
    if first.counts != other.counts or not torch.allclose(*losses, rtol=1e-4, atol=1e-6):
        raise RuntimeError(
            "the training data came in another order, or were others, for another group of queries, so their scores do "
            "not belong to the same examples. curvature.check_deterministic(model, data) says what differs; pass data "
            "that come in the same order every time."
        )


def _result(found: list[tuple[QueryRows, Found]]) -> Influence:
    """The groups of queries together."""
    blocks = [part.by_block() for _, part in found]
    positions = [part.by_position() for _, part in found]
    by_block = {name: torch.cat([one[name] for one in blocks]) for name in blocks[0]}
    number, examples = sum(rows.number for rows, _ in found), sum(found[0][1].counts)
    zero = found[0][0].like.new_zeros(number, examples)
    return Influence(
        sum(by_block.values(), zero),
        by_block,
        {name: torch.cat([one[name] for one in positions]) for name in positions[0]},
        found[0][1].total,
        {name: torch.cat([rows.dropped[name] for rows, _ in found]) for name in found[0][0].dropped},
        {name: torch.cat([rows.kept[name] for rows, _ in found]) for name in found[0][0].kept},
    )
