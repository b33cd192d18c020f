"""Is a budget kept, a prediction right, and nothing computed twice?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.reports import Plan, Report, report
from curvature.reports.sections.budget import Budget, Need, allot
from tests.curvature.problems import PROBLEMS, Problem

BUDGET = sys.modules[Budget.__module__]


def made() -> Problem:
    return PROBLEMS["mlp_ce"]()


def run(problem: Problem, **options: Any) -> Report:
    found = report(problem.model, problem.loss_fn, problem.data, **{"progress": False, "k": 3, **options})
    assert isinstance(found, Report)
    return found


def test_shares() -> None:
    needs = [Need(2, 10), Need(3, 3), Need(5, 25), Need(0, 0)]
    assert allot(needs, 100) == [10, 3, 25, 0]
    assert allot(needs, 10) == [2, 3, 5, 0]
    assert allot(needs, 24) == [2 + 4, 3, 5 + 10, 0]  # half of what more they want
    assert allot(needs, 6) == [2 + 1, 3, 0, 0]  # the third is cut, and what it leaves goes to the first
    assert allot(needs, 1) == [0, 0, 0, 0]


@pytest.mark.parametrize("exact", [False, None])
@pytest.mark.parametrize("products", [15, 60, 200, 700])
def test_a_budget_of_products_is_kept(products: int, exact: bool | None) -> None:
    found = run(made(), products=products, exact=exact)
    spent = sum(cost.products for cost in found.costs)
    # The last step of a search, and the last block of vectors, may go beyond what was left.
    assert spent <= products + 12
    assert spent >= min(products, 300) / 3
    assert found.budget == f"{products} products"
    assert found.refused == ()
    if products == 15:
        assert "layers (ggn)" in found.cut and found.densities == {}
    if exact is None and products == 700:
        assert found.cut == ()


def test_more_products_give_smaller_errors() -> None:
    errors = [run(made(), products=n, exact=False, sections=["trace"]).traces["ggn"].trace.error for n in (45, 200)]
    assert errors[1] < errors[0] / 1.4


class Slow(nn.Module):
    """A model each of whose evaluations takes a second of invented time."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.inner, self.clock = made().model, clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += 1
        return self.inner(x)


@pytest.mark.parametrize("seconds", [100.0, 400.0])
def test_a_budget_of_seconds_is_kept(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(BUDGET, "clock", lambda: clock[0])
    problem, model = made(), Slow(clock)
    found = report(model, problem.loss_fn, problem.data, budget=seconds, k=3, exact=False, progress=False)
    # A product is two batches of a second each; beyond the last of them goes the end of a search or of a block.
    assert found.seconds == clock[0] <= seconds * 1.05 + 20
    assert clock[0] >= seconds / 2
    assert found.refused == ()


class Busy(Slow):
    """A machine whose pace changes: seconds of each evaluation, by how many there were; the last one stays."""

    def __init__(self, clock: list[float], *pace: tuple[int, float]) -> None:
        super().__init__(clock)
        self.pace, self.count = pace, [0]  # what is no attribute of a module is not put back after a pass

    def forward(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        self.clock[0] += next((seconds for until, seconds in self.pace if self.count[0] <= until), self.pace[-1][1]) - 1
        return super().forward(x)


@pytest.mark.parametrize(
    "pace",
    [
        pytest.param(((10**9, 1.0),), id="steady"),
        pytest.param(((16, 0.05), (10**9, 1.0)), id="busier than when it was measured"),
        pytest.param(((14, 0.5), (15, 40.0), (10**9, 0.5)), id="interrupted while it was measured"),
        pytest.param(((16, 3.0), (10**9, 0.25)), id="busy at first"),
    ],
)
def test_eigenvalues_and_spectrum_come_first_on_a_busy_machine(
    pace: tuple[tuple[int, float], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(BUDGET, "clock", lambda: clock[0])
    problem, model = made(), Busy(clock, *pace)
    found = report(model, problem.loss_fn, problem.data, budget=240.0, k=3, exact=False, progress=False)
    assert found.eigenvalues["hessian"].largest and "hessian" in found.densities
    assert found.refused == () and not {"eigenvalues (hessian)", "density (hessian)"} & {*found.cut}
    assert clock[0] <= 240 * 1.05 + 40
    parts = [cost.part for cost in found.costs]
    assert parts[:3] == ["measuring", "eigenvalues (hessian)", "density (hessian)"]


def test_fewer_eigenvalues_are_better_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(BUDGET, "clock", lambda: clock[0])
    problem, model = made(), Slow(clock)
    options: dict[str, Any] = {"k": 10, "exact": False, "matrix": "hessian", "sections": ["eigenvalues"]}
    found = report(model, problem.loss_fn, problem.data, budget=45.0, progress=False, **options)
    result = found.eigenvalues["hessian"]
    assert found.cut == () and clock[0] <= 45 * 1.1
    assert 1 <= len(result.largest) < 10 and len(result.smallest) == 1
    assert result.alignment is None and "gradient in the top" not in str(found)
    values = torch.linalg.eigvalsh(curvature.hessian(made().model, made().loss_fn, made().data).to_dense())
    for pair in (*result.largest, *result.smallest):
        assert float((values - pair.value).abs().min()) <= pair.residual + 1e-12


def test_nothing_is_cut_without_a_budget() -> None:
    found = run(made())
    assert found.budget is None and found.cut == ()
    assert {cost.part.split(" ")[0] for cost in found.costs} >= {"eigenvalues", "trace", "density", "layers", "noise"}


@pytest.mark.parametrize("name", ["mlp_ce", "encoder_pre_norm"])
def test_a_prediction_holds_within_a_factor(name: str) -> None:
    problem = PROBLEMS[name]()
    sections = ("eigenvalues", "trace", "noise", "distances", "layers")
    options: dict[str, Any] = {"k": 3, "exact": False, "products": 10_000, "sections": sections}
    plan = report(problem.model, problem.loss_fn, problem.data, dry_run=True, **options)
    assert isinstance(plan, Plan) and plan.spent < 10
    assert not any(row.cut for row in plan.rows)
    found = run(problem, **options)
    spent = sum(cost.products for cost in found.costs)
    assert plan.total / 2 <= spent <= plan.total * 2
    predicted, taken = (
        {part.split(" ")[0] for part in parts} for parts in (_parts(plan), [c.part for c in found.costs])
    )
    assert predicted <= taken


def _parts(plan: Plan) -> list[str]:
    return [row.part for row in plan.rows]


def test_a_dry_run_says_what_is_cut() -> None:
    problem = made()
    plan = report(problem.model, problem.loss_fn, problem.data, dry_run=True, products=40, exact=False)
    assert [row.part for row in plan.rows if row.cut] != []
    assert plan.total <= 40
    shown = str(plan)
    assert "cut" in shown and "budget 40" in shown and max(map(len, shown.splitlines())) <= 100


# Starting from what is known ------------------------------------------------------------------------------------------


def test_a_warm_start_gets_further() -> None:
    problem = PROBLEMS["encoder_pre_norm"]()
    options: dict[str, Any] = {"exact": False, "sections": ["eigenvalues"], "matrix": "hessian", "rtol": 1e-2}
    before = run(problem, **options)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(1e-3)
    warm, cold = (run(problem, warm_start=start, **options).eigenvalues["hessian"] for start in (before, None))
    assert warm.converged and warm.products <= cold.products
    assert sum(pair.residual for pair in warm.largest) < 0.1 * sum(pair.residual for pair in cold.largest)
    for pair, other in zip(warm.largest, cold.largest, strict=True):
        assert abs(pair.value - other.value) <= pair.residual + other.residual


def test_a_warm_start_from_a_file(tmp_path: Path) -> None:
    problem = made()
    first = run(problem)
    first.save(tmp_path / "first.pt")
    loaded = Report.load(tmp_path / "first.pt")
    assert loaded.to_json() == first.to_json()
    assert torch.equal(loaded.eigenvectors["ggn"], first.eigenvectors["ggn"])
    assert run(problem, warm_start=loaded, exact=False, sections=["eigenvalues"]).eigenvalues["ggn"].converged


def test_a_warm_start_from_another_model_is_refused() -> None:
    first, other = run(made()), PROBLEMS["cnn"]()
    with pytest.raises(ValueError, match=r"warm_start is a report on 43 parameters; here there are \d+"):
        run(other, warm_start=first)


class Killed(BaseException):
    """Neither an error of a section nor anything that a report would catch."""


def test_a_report_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, file = made(), tmp_path / "report.pt"
    options: dict[str, Any] = {"exact": False, "k": 6, "rtol": 1e-10, "sections": ("eigenvalues", "trace", "distances")}
    whole = run(problem, **options)
    products = 0

    def count(op: Any, x: Tensor) -> Tensor:
        nonlocal products
        products += x.numel() // op.shape[1]
        if limit is not None and products > limit:
            raise Killed
        return genuine(op, x)

    genuine = curvature.matrices.full.GaussNewtonOperator.apply
    monkeypatch.setattr(curvature.matrices.full.GaussNewtonOperator, "apply", count)
    limit: int | None = 33  # within the search for the eigenvalues of the GGN, those of the Hessian being stored
    with pytest.raises(Killed):
        run(problem, resume=curvature.Checkpoint(file, seconds=0), **options)
    assert file.exists()
    products, limit = 0, None
    resumed = run(problem, resume=file, **options)
    first, ggn = resumed.eigenvalues, whole.eigenvalues["ggn"]
    assert first == whole.eigenvalues and resumed.traces == whole.traces and resumed.distances == whole.distances
    spent = {cost.part: cost.products for cost in resumed.costs}
    assert spent["eigenvalues (hessian)"] == 0  # taken from the file
    assert 0 < spent["eigenvalues (ggn)"] <= ggn.products - 10  # taken up from within
    for key, vectors in whole.eigenvectors.items():
        assert torch.equal(resumed.eigenvectors[key], vectors)
    products = 0
    assert run(problem, resume=file, **options).traces == whole.traces
    assert products <= 30  # nothing but the measurement


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    problem = made()
    run(problem, resume=tmp_path / "report.pt")
    with torch.no_grad():
        next(problem.model.parameters()).add_(0.1)
    with pytest.raises(curvature.CheckpointError, match="values of the parameters"):
        run(problem, resume=tmp_path / "report.pt")


def test_eigenvalues_that_have_not_converged_say_so() -> None:
    found = run(made(), products=60, exact=False, k=10, rtol=1e-12, sections=["eigenvalues"], matrix="hessian")
    result = found.eigenvalues["hessian"]
    assert not result.converged
    assert "*" in str(found) or "not finished" in str(found)
    dense = curvature.hessian(made().model, made().loss_fn, made().data).to_dense()
    values = torch.linalg.eigvalsh(dense)
    for pair in (*result.largest, *result.smallest):  # still near eigenvalues, as near as they say
        assert float((values - pair.value).abs().min()) <= pair.residual + 1e-12
