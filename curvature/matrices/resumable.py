"""Eigenpairs of operators that take long: a killed run continues from its file, with the identical result."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import solvers
from curvature.estimation.checkpoint import Checkpoint, CheckpointError, Resume, digest, problem_identity
from curvature.matrices.dataset_operator import DatasetOperator
from curvature.model.arguments import a, checked, count, one_of, optional
from solvers import Eigenpairs, LinearOperator
from solvers.eigenpairs.result import Which

# Options that decide where a run begins and what it looks for; others only decide when it stops, or where it works.
_SHAPING = ("method", "basis_size", "search_copies", "v0", "generator", "preconditioner")
_OF_THE_START = ("basis_size", "v0", "generator")


@checked(
    op=a(LinearOperator, "a LinearOperator"),
    path=a((str, os.PathLike, Checkpoint), "a path or a Checkpoint"),
    which=one_of(Which),
    max_products=optional(count()),
)
def resumable_eigsh(
    op: LinearOperator,
    path: Resume,
    k: int = 10,
    which: Which = "LA",
    **options: Any,
) -> Eigenpairs:
    """Eigenpairs as by :func:`solvers.eigsh`, with the run kept in a file.

    If the file exists, the run continues from it, with the result of an uninterrupted run: bit for
    bit where products are. The file says which problem it belongs to: the parameters' names, shapes and values, the
    loss, the options, and the product with one vector, in which the data and all else show. A finished run stays in the
    file; calling this again costs ``k + 1`` products.

    Args:
        op: Symmetric operator.
        path: The file, or a :class:`Checkpoint` that says how often to save it.
        k: How many pairs.
        which: Which ones, see :func:`solvers.eigsh`.
        options: Further options of :func:`solvers.eigsh`. Those that say when to stop (``rtol``, ``atol``,
            ``max_products``) may differ from those of the run before, and so may ``storage``; all others must not.

    Raises:
        CheckpointError: If the file is damaged or belongs to another problem.
        ValueError: As :func:`solvers.eigsh`; for ``state`` and ``checkpoint``, which are the file's; and for a matrix
            of data that are shared out over processes.
    """
    if given := [name for name in ("state", "checkpoint") if options.get(name) is not None]:
        raise ValueError(f"{given[0]}= is kept in the file here; leave it out, or call solvers.eigsh.")
    if isinstance(op, DatasetOperator) and op.problem.shares.several:
        raise ValueError(
            f"{os.fspath(path.path if isinstance(path, Checkpoint) else path)} keeps the run of one process, and this "
            "matrix is of the data of several. Call solvers.eigsh(op, ...) in all of them."
        )
    shaping = {name: _shown(options.get(name)) for name in _SHAPING}
    file = Checkpoint.at(path).of(_identity(op) | {"k": k, "which": which} | shaping)
    saved = file.load()
    probe = _probe(op)
    if saved is not None:
        _refuse_other_products(file, saved["probe"], probe)
        options = {name: value for name, value in options.items() if name not in _OF_THE_START}

    def keep(run: dict[str, Tensor]) -> None:
        file.offer(lambda: {"run": run, "probe": probe})

    pairs = solvers.eigsh(op, k, which, state=None if saved is None else saved["run"], checkpoint=keep, **options)
    file.save({"run": pairs.state, "probe": probe})
    return pairs


def _identity(op: LinearOperator) -> dict[str, Any]:
    known = {"operator": repr(op), "dtype": str(op.dtype)}
    if isinstance(op, DatasetOperator):
        known |= problem_identity(op.problem.model, op.problem.loss_fn, op.rows)
    return known


def _probe(op: LinearOperator) -> Tensor:
    """The product with one fixed vector, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(op.in_shape, generator=generator, dtype=torch.float64)
    return (op @ vector.to(op.device, op.dtype)).detach().cpu()


def _refuse_other_products(file: Checkpoint, old: Tensor, new: Tensor) -> None:
    """Raise unless two products with the same vector agree to rounding; the solver itself refuses NaN."""
    distance, size = torch.linalg.vector_norm((new - old).double()), torch.linalg.vector_norm(old.double())
    if distance > torch.finfo(new.dtype).eps ** (2 / 3) * size:
        raise CheckpointError(
            f"{file.path} belongs to another computation: the product with one fixed vector differs by "
            f"{float(distance / size):.2g} of its size, so the data are others, or the model draws random numbers "
            "(dropout) from another seed. Name another file, or remove this one to start anew."
        )


def _shown(option: Any) -> str:
    """An option as a string that is equal exactly where the option is."""
    if isinstance(option, Tensor):
        return digest([option])
    if isinstance(option, torch.Generator):
        return digest([option.get_state()])
    return repr(option)
