"""One call that looks at the curvature of a model from all sides, within a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from curvature.estimation.checkpoint import Checkpoint
from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.model.arguments import Check, a, checked, optional, real
from curvature.model.data import Data, Output
from curvature.model.shares import Shares
from curvature.reports.document import Plan, Report
from curvature.reports.results import ON_REQUEST
from curvature.reports.run import SECTIONS, Course
from curvature.reports.sections.budget import Budget
from curvature.reports.sections.store import Store
from curvature.reports.sections.study import MATRICES, Study
from curvature.structures.by_name import BLOCKS
from curvature.structures.estimator import Curvature
from solvers.outcome.arguments import flag


def _check_among(words: tuple[str, ...], kind: type | tuple[type, ...] = ()) -> Check:
    """A word, or several in a sequence; or objects of a class."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, (str, kind, Sequence)):
            raise TypeError(f"{name} are among {', '.join(words)}, not {value!r}.")
        entries = _tuple(value)
        if not entries:
            raise ValueError(f"{name} is empty; name some of {', '.join(words)}.")
        for entry in entries:
            if not isinstance(entry, kind) and not (isinstance(entry, str) and entry in words):
                raise ValueError(f"{name} are among {', '.join(words)}; {entry!r} is not.")
        return value

    return check


@overload
def report(model: nn.Module, loss_fn: Any, data: Data, *, dry_run: Literal[True], **options: Any) -> Plan: ...
@overload
def report(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    budget: float | None = ...,
    products: int | None = ...,
    matrix: str | Sequence[str] = ...,
    sections: str | Sequence[str] | None = ...,
    k: int = ...,
    damping: float = ...,
    structures: str | Curvature | Sequence[str | Curvature] = ...,
    exact: bool | None = ...,
    rtol: float = ...,
    params: Any = ...,
    output: Output | None = ...,
    class_dim: ClassDim = ...,
    batch_dim: BatchDim = ...,
    seed: int = ...,
    lr: float | None = ...,
    warm_start: Report | None = ...,
    resume: str | os.PathLike[str] | Checkpoint | None = ...,
    dry_run: Literal[False] = ...,
    progress: bool | None = ...,
    process_group: Any = ...,
) -> Report: ...
@checked(  # type: ignore[misc]  # as a dry run takes any options, its overload overlaps
    loss_fn=check_loss,
    budget=optional(real(low=0.0, open_low=True)),
    products=optional(real(low=0.0, open_low=True)),
    matrix=_check_among(tuple(MATRICES)),
    sections=optional(_check_among(SECTIONS)),
    damping=real(low=0.0, open_low=True),
    structures=_check_among(tuple(BLOCKS), Curvature),
    exact=optional(flag),
    rtol=real(low=0.0, open_low=True),
    lr=optional(real(low=0.0, open_low=True)),
    warm_start=optional(a(Report, "an earlier Report")),
    resume=optional(a((str, os.PathLike, Checkpoint), "a path or a Checkpoint")),
    dry_run=flag,
)
def report(  # the options of a dry run are those below
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    budget: float | None = None,
    products: int | None = None,
    matrix: str | Sequence[str] = ("hessian", "ggn"),
    sections: str | Sequence[str] | None = None,
    k: int = 10,
    damping: float = 1e-3,
    structures: str | Curvature | Sequence[str | Curvature] = ("diagonal", "kfac", "ekfac"),
    exact: bool | None = None,
    rtol: float = 1e-3,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    seed: int = 0,
    lr: float | None = None,
    warm_start: Report | None = None,
    resume: str | os.PathLike[str] | Checkpoint | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    process_group: Any = None,
) -> Report | Plan:
    r"""Look at the curvature of a loss from all sides; every number comes with its error.

    ================  ===============================================================================================
    ``"loss"``        the loss and the norm of its gradient
    ``"coverage"``    which curvature every parameter can get
    ``"eigenvalues"`` the ends of the spectrum, and the share of the gradient there
    ``"trace"``       trace and Frobenius norm, and the trace of each layer
    ``"noise"``       norms of the examples' gradients, and the gradient noise scale
    ``"density"``     spectral density; effective dimension and condition of the GGN at ``damping``
    ``"distances"``   how far diagonal, K-FAC and EKFAC are from the GGN, by layer
    ``"layers"``      the largest eigenvalue of each layer
    ``"sensitivity"`` how much the loss would rise with each layer's weights at 8, 4, 3, 2 bits; only on request
    ================  ===============================================================================================

    Small matrices (up to 2000 parameters) are formed, and everything is exact. For others the sections are ordered by
    worth: within a budget each gets the least that makes it useful, as far as that goes, and what is left is shared
    out. A section that refuses is listed with its reason, and the rest goes on. The model is evaluated in its current
    mode and left as it is: parameters, gradients, buffers, hooks, random numbers.

    >>> from torch import nn
    >>> x, y = torch.linspace(-1, 1, 8).unsqueeze(1), torch.linspace(-1, 1, 8).unsqueeze(1) ** 2
    >>> found = report(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), nn.MSELoss(), (x, y), k=2)
    >>> found.eigenvalues["ggn"].converged, found.traces["ggn"].trace.exact
    (True, True)

    Args:
        model: Any module.
        loss_fn: The loss module. A plain function serves the Hessian of one batch only.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        budget: Seconds to spend; None for no limit.
        products: Products with a matrix to spend in their place; a pass over the data counts as one.
        matrix: ``"hessian"``, ``"ggn"`` or both, the more interesting one first.
        sections: Some of the above; None for all but those on request.
        k: How many of the largest eigenvalues.
        damping: :math:`\lambda`, in units of the matrix: what an optimizer or a prior adds to it.
        structures: Structures to compare with the GGN: names of :func:`curvature.fisher`, or curvatures with options of
            their own, such as ``KroneckerFisher(sharing="reduce")``.
        exact: Whether to form the matrices; None does so where they are small.
        rtol: Residual of the eigenvalues, relative to them.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        seed: Of the random vectors; each section has its own.
        lr: Learning rate of plain gradient descent. The report then says where the largest eigenvalue of the Hessian
            is against its edge of stability, ``2 / lr``; :func:`curvature.dynamics` tells it of other optimizers.
        warm_start: An earlier report on the same model: the search for eigenvalues starts from its eigenvectors.
        resume: A file (or :class:`~curvature.Checkpoint`) that keeps finished sections and the running
            search, to be resumed after a crash.
        dry_run: Predict costs instead, after two products with each matrix.
        progress: True shows a progress bar, False never, None on a terminal.
        process_group: Processes whose data together are the data, see :func:`curvature.hessian`. All of them make this
            call and get the same report, by the clock of the first; examples are counted rank by rank. ``save`` writes
            in the first of them alone. Without ``resume``.

    Returns:
        The report; print it, or ``save("report.html")``. With ``dry_run`` the plan.

    Raises:
        TypeError: If an argument is not what it should be.
        ValueError: If an argument is out of range, the data are empty, or the loss is not finite.
        NondeterministicError: If dropout is active: the loss would be another one in each pass.
        CheckpointError: If the file to resume from belongs to something else.
    """
    matrices, chosen = _tuple(matrix), _tuple(_DEFAULT if sections is None else sections)
    if sections is not None and "distances" in chosen and "ggn" not in matrices:
        raise ValueError(f"distances are those to the GGN; add it to matrix={matrices}, or leave the section out.")
    if lr is not None and not ("hessian" in matrices and "eigenvalues" in chosen):
        raise ValueError(
            f"lr={lr:g} is compared with the eigenvalues of the Hessian, which are left out here: leave lr out, or "
            f"have 'hessian' in matrix={matrices} and 'eigenvalues' in sections={chosen}."
        )
    shares = Shares(process_group)
    if shares.several and resume is not None:
        raise ValueError("resume keeps the run of one process: leave it out, or process_group.")
    account = Budget(budget, products, shares)
    with torch.inference_mode(False):
        with shares.together():
            study = Study(
                model,
                loss_fn,
                data,
                budget=account,
                store=Store(resume),
                k=k,
                damping=damping,
                rtol=rtol,
                seed=seed,
                structures=_tuple(structures),
                exact=exact,
                params=params,
                output=output,
                class_dim=class_dim,
                batch_dim=batch_dim,
                process_group=process_group,
            )
            course = Course(study, matrices, chosen, lr)
            course.begin(warm_start)
        if dry_run:
            return course.plan()
        course.all(progress)
        return course.result()


_DEFAULT = tuple(section for section in SECTIONS if section not in ON_REQUEST)


def _tuple(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, (str, Curvature)) else tuple(given)
