"""One call that looks at the curvature of a model from all sides, within a budget."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal, overload

import torch
from torch import nn
from tqdm import tqdm

from curvature.checkpoint import Checkpoint
from curvature.coverage import Coverage, coverage
from curvature.data import Data, Output
from curvature.determinism import NondeterministicError, check_deterministic, dropout_modules
from curvature.losses import ClassDim
from curvature.report import density as densities
from curvature.report import distances, eigenvalues, gradients, layers, traces
from curvature.report.budget import Budget, Need, allot
from curvature.report.codec import decode, encode
from curvature.report.document import RESULTS, Plan, PlanRow, Report
from curvature.report.results import Cost, EigenvaluesResult, Matrix, Refusal, TraceResult
from curvature.report.store import Store
from curvature.report.study import MATRICES, Study
from curvature.structures import BLOCKS

SECTIONS = ("loss", "coverage", "eigenvalues", "trace", "noise", "density", "distances", "layers")


_OF_MATRICES = {"eigenvalues", "trace", "density", "distances", "layers"}


@dataclass(frozen=True)
class Task:
    """A section, of one matrix or of none.

    Attributes:
        section: One of :data:`SECTIONS`.
        matrix: The matrix it is about, or None.
        need: What it costs, in units of the budget.
        run: Computes it with what it was allotted.
    """

    section: str
    matrix: Matrix | None
    need: Need
    run: Callable[[float], Any]

    @property
    def name(self) -> str:
        """Section and matrix."""
        return self.section if self.matrix is None else f"{self.section} ({self.matrix})"


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
    structures: str | Sequence[str] = ...,
    exact: bool | None = ...,
    rtol: float = ...,
    params: Any = ...,
    output: Output | None = ...,
    class_dim: ClassDim = ...,
    seed: int = ...,
    warm_start: Report | None = ...,
    resume: str | os.PathLike[str] | Checkpoint | None = ...,
    dry_run: Literal[True],
    progress: bool | None = ...,
) -> Plan: ...
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
    structures: str | Sequence[str] = ...,
    exact: bool | None = ...,
    rtol: float = ...,
    params: Any = ...,
    output: Output | None = ...,
    class_dim: ClassDim = ...,
    seed: int = ...,
    warm_start: Report | None = ...,
    resume: str | os.PathLike[str] | Checkpoint | None = ...,
    dry_run: Literal[False] = ...,
    progress: bool | None = ...,
) -> Report: ...
def report(
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
    structures: str | Sequence[str] = ("diagonal", "kfac", "ekfac"),
    exact: bool | None = None,
    rtol: float = 1e-3,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    seed: int = 0,
    warm_start: Report | None = None,
    resume: str | os.PathLike[str] | Checkpoint | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
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
        sections: Some of the above; None for all.
        k: How many of the largest eigenvalues.
        damping: :math:`\lambda`, in units of the matrix: what an optimizer or a prior adds to it.
        structures: Structures of :func:`curvature.fisher` to compare with the GGN.
        exact: Whether to form the matrices; None does so where they are small.
        rtol: Residual of the eigenvalues, relative to them.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        seed: Of the random vectors; each section has its own.
        warm_start: An earlier report on the same model: the search for eigenvalues starts from its eigenvectors.
        resume: A file (or :class:`~curvature.checkpoint.Checkpoint`) that keeps finished sections and the running
            search, to be taken up after a crash.
        dry_run: Predict costs instead, after two products with each matrix.
        progress: True shows a progress bar, False never, None on a terminal.

    Returns:
        The report; print it, or ``save("report.html")``. With ``dry_run`` the plan.

    Raises:
        TypeError: If an argument is not what it should be.
        ValueError: If an argument is out of range, the data are empty, or the loss is not finite.
        NondeterministicError: If dropout is active: the loss would be another one in each pass.
        CheckpointError: If the file to resume from belongs to something else.
    """
    matrices = _check(model, loss_fn, matrix, sections, k, damping, structures, rtol, warm_start)
    account = Budget(budget, products)
    with torch.inference_mode(False):
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
        )
        run = Run(study, matrices, _tuple(SECTIONS if sections is None else sections))
        run.begin(warm_start)
        if dry_run:
            return run.plan()
        run.all(progress)
        return run.result()


class Run:
    """The course of a report: what is planned, done, refused and cut."""

    def __init__(self, study: Study, matrices: tuple[Matrix, ...], sections: tuple[str, ...]) -> None:
        self.study, self.matrices, self.sections = study, matrices, sections
        self.refused: list[Refusal] = []
        self.notes: list[str] = []
        self.cut: list[str] = []
        self.costs: list[Cost] = []
        self.found: dict[str, dict[Matrix | None, Any]] = {section: {} for section in SECTIONS}

    def begin(self, warm_start: Report | None) -> None:
        """Look at the model and the data, and measure what things cost."""
        study = self.study
        model, _, data = study.given
        if names := ", ".join(dropout_modules(model)):
            raise NondeterministicError(
                f"dropout is active in {names}, so the loss is another one in each pass: call model.eval(), or set p=0."
            )
        if warm_start is not None:
            study.start_from(warm_start.eigenvectors)
        study.first_pass()
        self.found["loss"][None] = study.loss
        study.store.open(study.identity())
        try:
            check_deterministic(model, data, output=study.options["output"])
        except NondeterministicError as error:
            self.notes.append(f"{error}. The numbers of this report belong to one draw.")
        for matrix in self.matrices if _OF_MATRICES & {*self.sections} else ():
            try:
                study.measure(matrix)
            except Exception as error:
                self.refuse(matrix, error)
        study.choose_form()
        self.costs.append(Cost("measuring", study.budget.spent, study.budget.elapsed, study.budget.counted))

    def refuse(self, part: str, error: Exception) -> None:
        """Put down what cannot be done."""
        message = " ".join(str(error).split()) or "no reason given"
        self.refused.append(Refusal(part, type(error).__name__, message))

    def refuse_structure(self, structure: str, error: Exception) -> None:
        """Put down that there is no distance of a structure."""
        self.refuse(f"distances ({structure})", error)

    def tasks(self) -> list[Task]:
        """What is to be done, the most worthwhile first."""
        study, wanted = self.study, self.sections
        tasks = [Task("matrix", m, study.form_need(m), partial(study.form, m)) for m in study.to_form]
        return tasks + [task for task in self._sections() if task.section in wanted]

    def _sections(self) -> Iterator[Task]:
        study = self.study
        model, loss_fn, data = study.given
        known = [m for m in self.matrices if m in study.rates]

        def table(_: float) -> Coverage:
            return coverage(model, loss_fn, data, params=study.options["params"])

        def of(section: str, m: Matrix, module: Any, run: Callable[[Study, Matrix, float], Any]) -> Task:
            least, usual = (0, 0) if m in study.to_form else module.products(study, m)
            block = module in (traces, densities)
            return Task(section, m, study.need(m, least, usual, block), partial(run, study, m))

        yield Task("coverage", None, study.need(None, 1, 1), table)
        for m in known:
            yield of("eigenvalues", m, eigenvalues, eigenvalues.eigenvalues)
            yield of("trace", m, traces, traces.traces)
        passes = gradients.passes(study)
        yield Task("noise", None, study.need(None, passes, passes), lambda _: gradients.noise(study))
        for m in known:
            yield of("density", m, densities, densities.density)
        if "ggn" in known and study.structures:
            least, usual = (0, 0) if "ggn" in study.to_form else distances.products(study)
            fixed = distances.passes(study) * study.pass_cost
            need = Need(fixed + least * study.block_rates["ggn"], fixed + usual * study.block_rates["ggn"])
            yield Task(
                "distances", None, need, lambda amount: distances.distances(study, amount, self.refuse_structure)
            )
        for m in known:
            yield of("layers", m, layers, layers.layers)

    def plan(self) -> Plan:
        """What would be done within the budget."""
        study, tasks = self.study, self.tasks()
        amounts = allot([task.need for task in tasks], study.budget.left)
        rows = [
            PlanRow(task.name, amount, task.need.wanted, amount < task.need.least)
            for task, amount in zip(tasks, amounts, strict=True)
        ]
        return Plan(study.budget.unit, study.budget.amount, study.budget.spent, tuple(rows), tuple(self.refused))

    def all(self, progress: bool | None) -> None:
        """Do it, and share out anew after each section what is left."""
        study, tasks = self.study, self.tasks()
        total = sum(min(task.need.wanted, study.budget.left) for task in tasks)
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        hidden = None if progress is None else not progress
        with tqdm(total=total, desc="curvature report", bar_format=bar_format, disable=hidden, leave=False) as bar:
            while tasks:
                amounts = allot([task.need for task in tasks], study.budget.left)
                task, amount = tasks.pop(0), amounts[0]
                bar.set_postfix_str(task.name)
                if amount < task.need.least:
                    self.cut.append(task.name)
                    continue
                self.one(task, amount if study.budget.limited else inf)
                bar.update(min(task.need.wanted, bar.total - bar.n))

    def one(self, task: Task, amount: float) -> None:
        """Do a section, or take it from the file."""
        study, stored = self.study, self.study.store.content
        predicted = min(task.need.wanted, amount)
        before, counted = study.budget.elapsed, study.budget.counted
        try:
            if task.name in stored["sections"]:
                result = decode(RESULTS[task.section], stored["sections"][task.name])
                self._take_vectors(task)
            else:
                result = task.run(amount)
        except Exception as error:
            self.refuse(task.name, error)
            return
        self._keep(task, result)
        seconds = study.budget.elapsed - before
        self.costs.append(Cost(task.name, predicted, seconds, study.budget.counted - counted))

    def _take_vectors(self, task: Task) -> None:
        stored, m = self.study.store.content["vectors"], task.matrix
        if task.section == "eigenvalues" and m is not None and m in stored:
            self.study.vectors[m] = stored[m].to(self.study.problem.parameters.device)

    def _keep(self, task: Task, result: Any) -> None:
        if task.section == "matrix":
            return  # quick to form again
        study, m = self.study, task.matrix
        self.found[task.section][m] = result
        if isinstance(result, EigenvaluesResult) and m is not None:
            study.eigenvalues[m] = result
            study.store.content["vectors"][m] = study.vectors[m]
        if isinstance(result, TraceResult) and m is not None:
            study.traces[m] = result
        study.store.content["sections"][task.name] = encode(result)
        study.store.save()

    def result(self) -> Report:
        """All that was found."""
        study, found = self.study, self.found
        model, loss_fn, _ = study.given
        loss = study.loss
        assert loss is not None
        return Report(
            model=type(model).__name__,
            loss_fn=describe(loss_fn),
            parameters=study.size,
            layers={name: part.stop - part.start for name, part in study.layers.items()},
            loss=loss,
            coverage=found["coverage"].get(None),
            noise=found["noise"].get(None),
            eigenvalues=_by_matrix(found["eigenvalues"]),
            traces=_by_matrix(found["trace"]),
            densities=_by_matrix(found["density"]),
            distances=found["distances"].get(None),
            layer_eigenvalues=_by_matrix(found["layers"]),
            formed=tuple(study.dense),
            refused=tuple(self.refused),
            cut=tuple(self.cut),
            notes=tuple(self.notes),
            costs=tuple(self.costs),
            budget=None if not study.budget.limited else f"{study.budget.amount:g} {study.budget.unit}",
            seconds=study.budget.elapsed,
            peak_memory=peak_memory(study.problem.parameters.device),
            k=study.k,
            damping=study.damping,
            rtol=study.rtol,
            seed=study.seed,
            created=time.strftime("%Y-%m-%d %H:%M"),
            eigenvectors=dict(study.vectors),
        )


def _by_matrix(found: dict[Matrix | None, Any]) -> dict[Matrix, Any]:
    return {m: result for m, result in found.items() if m is not None}


def describe(loss_fn: Any) -> str:
    """The loss as a user would write it."""
    if not isinstance(loss_fn, nn.Module):
        return str(getattr(loss_fn, "__name__", type(loss_fn).__name__))
    reduction = getattr(loss_fn, "reduction", "mean")
    return type(loss_fn).__name__ + ("" if reduction == "mean" else f"(reduction={reduction!r})")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were in use: of the accelerator since it was last asked, or of the process; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on this system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check(
    model: Any,
    loss_fn: Any,
    matrix: Any,
    sections: Any,
    k: Any,
    damping: Any,
    structures: Any,
    rtol: Any,
    warm_start: Any,
) -> tuple[Matrix, ...]:
    """Refuse what makes no sense before anything is computed; returns the matrices."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, not {type(model).__name__}.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a loss module such as nn.CrossEntropyLoss(), not {type(loss_fn).__name__}.")
    if warm_start is not None and not isinstance(warm_start, Report):
        raise TypeError(f"warm_start is an earlier Report, not {type(warm_start).__name__}.")
    matrices, chosen = _tuple(matrix), _tuple(SECTIONS if sections is None else sections)
    for name, given, known in (
        ("matrix", matrices, tuple(MATRICES)),
        ("sections", chosen, SECTIONS),
        ("structures", _tuple(structures), tuple(BLOCKS)),
    ):
        if wrong := [entry for entry in given if entry not in known]:
            raise ValueError(f"{name} are among {', '.join(known)}; {wrong[0]!r} is not.")
    if sections is not None and "distances" in chosen and "ggn" not in matrices:
        raise ValueError(f"distances are those to the GGN; add it to matrix={matrices}, or leave the section out.")
    if not (isinstance(k, int) and k >= 1):
        raise ValueError(f"k is a whole number of eigenvalues, at least 1, not {k!r}.")
    for name, number in (("damping", damping), ("rtol", rtol)):
        if not (isinstance(number, (int, float)) and 0 < number < inf):
            raise ValueError(f"{name} is a positive number, not {number!r}.")
    return matrices


def _tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
