"""The run of a report: its sections in the order of their worth, each with its share of the budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from curvature.estimation.coverage import Coverage, coverage
from curvature.model.determinism import NondeterministicError, check_deterministic, dropout_modules
from curvature.model.messages import ProcessLost
from curvature.model.shares import ShareFailed
from curvature.reports.codec import decode, encode
from curvature.reports.document import Plan, PlanRow, Report
from curvature.reports.results import RESULTS, Cost, EigenvaluesResult, Matrix, Refusal, TraceResult
from curvature.reports.sections import density as densities
from curvature.reports.sections import distances, eigenvalues, gradients, layers, sensitivity, traces
from curvature.reports.sections.budget import Need, allot
from curvature.reports.sections.setting import setting
from curvature.reports.sections.study import Study

SECTIONS = tuple(RESULTS)

_OF_MATRICES = {"eigenvalues", "trace", "density", "distances", "layers"}


@dataclass(frozen=True)
class Job:
    """A section, of one matrix or without one.

    Attributes:
        section: One of :data:`SECTIONS`.
        matrix: The matrix it is about, or None.
        need: Gives its cost, in units of the budget, as products cost now.
        run: Computes it with what it was allotted.
    """

    section: str
    matrix: Matrix | None
    need: Callable[[], Need]
    run: Callable[[float], Any]

    @property
    def name(self) -> str:
        """Section and matrix."""
        return self.section if self.matrix is None else f"{self.section} ({self.matrix})"


class Course:
    """The run of a report: jobs planned, done, refused and cut."""

    def __init__(
        self, study: Study, matrices: tuple[Matrix, ...], sections: tuple[str, ...], lr: float | None = None
    ) -> None:
        self.study, self.matrices, self.sections, self.lr = study, matrices, sections, lr
        self.refused: list[Refusal] = []
        self.notes: list[str] = []
        self.cut: list[str] = []
        self.costs: list[Cost] = []
        self.found: dict[str, dict[Matrix | None, Any]] = {section: {} for section in SECTIONS}

    def begin(self, warm_start: Report | None) -> None:
        """Inspect the model and the data, and measure costs."""
        study = self.study
        model = study.given[0]
        if names := ", ".join(dropout_modules(model)):
            raise NondeterministicError(
                f"dropout is active in {names}, so the loss is another one in each pass: call model.eval(), or set p=0."
            )
        if warm_start is not None:
            study.start_from(warm_start.eigenvectors)
        study.first_pass()
        self.found["loss"][None] = study.loss
        study.store.open(study.identity(), study.seen, study.order)
        if (reason := self._chance()) is not None:
            self.notes.append(f"{reason}. The numbers of this report belong to one draw.")
        for matrix in self.matrices if _OF_MATRICES & {*self.sections} else ():
            try:
                with study.shares.together():
                    study.measure(matrix)
            except Exception as error:
                self.refuse(matrix, error)
        study.choose_form()
        self.costs.append(Cost("measuring", study.budget.spent, study.budget.elapsed, study.budget.counted))

    def _chance(self) -> str | None:
        """Why the loss is another one in each pass, if it is in some process."""
        study, own = self.study, None
        model, _, data = study.given
        with study.shares.together():
            try:
                if study.has_data:
                    check_deterministic(model, data, output=study.options["output"])
            except NondeterministicError as error:
                own = str(error)
        return next((reason for reason in study.shares.gather(own) if reason is not None), None)

    def refuse(self, part: str, error: Exception) -> None:
        """Record a part that cannot be computed; all processes record the error of the one where it happened.

        Raises:
            ProcessLost: If a process is gone: nothing more can be computed then.
        """
        if isinstance(error, ProcessLost):
            raise error
        own = type(error).__name__, " ".join(str(error).split()) or "no reason given"
        told = self.study.shares.gather(None if isinstance(error, ShareFailed) else own)
        self.refused.append(Refusal(part, *next((words for words in told if words is not None), own)))

    def refuse_structure(self, structure: str, error: Exception) -> None:
        """Record that the distance of a structure could not be computed."""
        self.refuse(f"distances ({structure})", error)

    def jobs(self) -> list[Job]:
        """The jobs to do, the most worthwhile first."""
        study, wanted = self.study, self.sections
        jobs = []
        for m in study.to_form:
            need = study.form_need(m)
            jobs.append(Job("matrix", m, partial(_settled, need), partial(study.form, m)))
        return jobs + [job for job in self._sections() if job.section in wanted]

    def _sections(self) -> Iterator[Job]:
        study = self.study
        model, loss_fn, data = study.given
        known = [m for m in self.matrices if m in study.rates]

        def table(_: float) -> Coverage:
            own = None
            with study.shares.together():
                if study.has_data:
                    own = coverage(model, loss_fn, data, **study.read)
            found: Coverage = next(one for one in study.shares.gather(own) if one is not None)
            return found

        def of(section: str, m: Matrix, module: Any, run: Callable[[Study, Matrix, float], Any]) -> Job:
            least, usual = (0, 0) if m in study.to_form else module.products(study, m)
            block = module in (traces, densities)
            return Job(section, m, partial(study.need, m, least, usual, block), partial(run, study, m))

        def of_passes(section: str, passes: float, run: Callable[[float], Any]) -> Job:
            return Job(section, None, partial(study.need, None, passes, passes), run)

        for m in known:  # what a reader came for, even where there is time for nothing else
            yield of("eigenvalues", m, eigenvalues, eigenvalues.eigenvalues)
            yield of("density", m, densities, densities.density)
        yield of_passes("coverage", 1, table)
        for m in known:
            yield of("trace", m, traces, traces.traces)
        yield of_passes("noise", gradients.passes(study), lambda _: gradients.noise(study))
        if "ggn" in known and study.structures:
            least, usual = (0, 0) if "ggn" in study.to_form else distances.products(study)

            def need() -> Need:
                fixed = distances.passes(study) * study.pass_cost
                return Need(fixed + least * study.block_rates["ggn"], fixed + usual * study.block_rates["ggn"])

            yield Job("distances", None, need, lambda amount: distances.distances(study, amount, self.refuse_structure))
        for m in known:
            yield of("layers", m, layers, layers.layers)
        yield of_passes("sensitivity", sensitivity.passes(study), lambda _: sensitivity.sensitivity(study))

    def plan(self) -> Plan:
        """The plan under the budget."""
        study, jobs = self.study, self.jobs()
        needs = [job.need() for job in jobs]
        amounts = allot(needs, study.budget.left)
        rows = [
            PlanRow(job.name, amount, need.wanted, amount < need.least)
            for job, need, amount in zip(jobs, needs, amounts, strict=True)
        ]
        return Plan(study.budget.unit, study.budget.amount, study.budget.spent, tuple(rows), tuple(self.refused))

    def all(self, progress: bool | None) -> None:
        """Do all jobs; after each section the rest of the budget is shared out again."""
        study, jobs = self.study, self.jobs()
        planned = allot([job.need() for job in jobs], study.budget.left)
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        hidden = True if study.shares.rank else None if progress is None else not progress
        with tqdm(
            total=sum(planned), desc="curvature report", bar_format=bar_format, disable=hidden, leave=False
        ) as bar:
            for i, job in enumerate(jobs):
                if job.matrix is not None:
                    with study.shares.together():
                        study.measure_again(job.matrix, job.need().least > study.budget.left)
                needs = [job.need() for job in jobs[i:]]
                amounts = allot(needs, study.budget.left)
                # The remainder serves a search that takes longer than predicted.
                spare = max(0.0, study.budget.left - sum(amounts)) if study.budget.limited else inf
                bar.set_postfix_str(job.name)
                if amounts[0] < needs[0].least:
                    self.cut.append(job.name)
                else:
                    self.one(job, amounts[0] + spare, needs[0].wanted)
                bar.update(planned[i])

    def one(self, job: Job, amount: float, wanted: float) -> None:
        """Do a section with an amount, where it wanted so much, or take it from the file."""
        study, stored = self.study, self.study.store.content
        predicted = min(wanted, amount)
        before, counted = study.budget.elapsed, study.budget.counted
        try:
            if job.name in stored["sections"]:
                result = decode(RESULTS[job.section], stored["sections"][job.name])
                self._take_vectors(job)
            else:
                with study.shares.together():
                    result = job.run(amount)
        except Exception as error:
            self.refuse(job.name, error)
            return
        self._keep(job, result)
        seconds = study.budget.elapsed - before
        self.costs.append(Cost(job.name, predicted, seconds, study.budget.counted - counted))
        if job.matrix is not None:
            study.learn(job.matrix, seconds, study.budget.counted - counted)

    def _take_vectors(self, job: Job) -> None:
        stored, m = self.study.store.content["vectors"], job.matrix
        if job.section == "eigenvalues" and m is not None and m in stored:
            self.study.vectors[m] = stored[m].to(self.study.problem.parameters.device)

    def _keep(self, job: Job, result: Any) -> None:
        if job.section == "matrix":
            return  # quick to form again
        study, m = self.study, job.matrix
        self.found[job.section][m] = result
        if isinstance(result, EigenvaluesResult) and m is not None:
            study.eigenvalues[m] = result
            study.store.content["vectors"][m] = study.vectors[m]
        if isinstance(result, TraceResult) and m is not None:
            study.traces[m] = result
        study.store.content["sections"][job.name] = encode(result)
        study.store.save()

    def result(self) -> Report:
        """All findings."""
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
            sensitivity=found["sensitivity"].get(None),
            layer_eigenvalues=_by_matrix(found["layers"]),
            formed=tuple(study.dense),
            refused=tuple(self.refused),
            cut=tuple(self.cut),
            notes=tuple(self.notes),
            costs=tuple(self.costs),
            budget=None if not study.budget.limited else f"{study.budget.amount:g} {study.budget.unit}",
            seconds=study.budget.elapsed,
            peak_memory=_largest(study.shares.gather(peak_memory(study.problem.parameters.device))),
            k=study.k,
            damping=study.damping,
            rtol=study.rtol,
            seed=study.seed,
            created=study.shares.first(time.strftime("%Y-%m-%d %H:%M")),
            setting=setting(study, self.lr, found["noise"].get(None)),
            eigenvectors=dict(study.vectors),
            writes=study.shares.rank == 0,
        )


def _largest(sizes: list[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def _settled(need: Need) -> Need:
    return need


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
