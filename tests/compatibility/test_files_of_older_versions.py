"""Do files that older versions wrote still hold what they held?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
import solvers
from curvature import Report
from tests.compatibility.make_fixtures import (
    CE,
    FILES,
    OPTIMIZERS,
    POSTERIORS,
    STEPS,
    SUMS,
    eigenpairs,
    network,
    posterior,
    predictions,
    step,
    sums,
)

# Other machines round otherwise; the one that wrote the files finds the same bits.
RTOL = 1e-12
# SOAP divides by roots of small moments: one rounding of the weights moves its step by 5e-12 of the largest weight. A
# step from a state that was not read is off by 2e-2 (SOAP) to 0.26 (K-FAC).
STEP_RTOL = 1e-9


def read(path: Path) -> Any:
    """Tensors and plain values: a class of ours, by whatever name, would be refused."""
    return torch.load(path, weights_only=True)


def assert_close(actual: Any, expected: Any, rtol: float = RTOL) -> None:
    """All that is expected, to a part of the largest number of a tensor; later versions may have further keys."""
    if isinstance(expected, Mapping):
        assert expected.keys() <= actual.keys()
        for key, value in expected.items():
            assert_close(actual[key], value, rtol)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, rtol)
    elif isinstance(expected, Tensor):
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * largest)
    else:
        assert actual == expected


class Problem:
    """The network and the data of a folder; passes through the network are counted."""

    def __init__(self, folder: Path) -> None:
        saved = read(folder / "problem.pt")
        self.folder, self.values = folder, saved["values"]
        self.batches, self.targets, self.queries = saved["batches"], saved["targets"], saved["queries"]
        self.expected = read(folder / "expected.pt")
        self.model, self.passes = network(self.values), 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


@pytest.fixture(params=sorted(path for path in FILES.iterdir() if path.is_dir()), ids=lambda folder: folder.name)
def problem(request: pytest.FixtureRequest, tmp_path: Path) -> Problem:
    """A copy, so that nothing that is read is written."""
    return Problem(Path(shutil.copytree(request.param, tmp_path / "files")))


# Optimizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_go_on(problem: Problem, kind: str) -> None:
    saved = read(problem.folder / f"{kind}.pt")
    model, loss_fn = network(saved["before"]), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[kind](model, loss_fn)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.steps == STEPS  # type: ignore[attr-defined]
    assert_close(optimizer.state_dict(), saved["optimizer"], rtol=0)
    step(model, loss_fn, optimizer, saved["batch"])
    assert_close(model.state_dict(), saved["after"], STEP_RTOL)


# Reports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "estimated"])
def test_reports_are_read_and_written_again_as_they_are(problem: Problem, name: str) -> None:
    path = problem.folder / f"report_{name}.json"
    before = path.read_text(encoding="utf-8")
    Report.load(path).save(path)
    again = json.loads(path.read_text(encoding="utf-8"))
    later = again.pop("sensitivity"), again.pop("setting")
    assert again.pop("sha256") and later == (None, None)  # entries of later versions
    assert again == json.loads(before)


def test_an_exact_report_holds_its_numbers(problem: Problem) -> None:
    report = Report.load(problem.folder / "report_exact.json")
    G = curvature.ggn(problem.model, CE, problem.batches).to_dense()
    assert_report(report, problem, CE, [y for _, y in problem.batches], "ggn", G)
    assert report.loss_fn == "CrossEntropyLoss" and str(report.parameters) in str(report)


def test_an_estimated_report_holds_its_numbers(problem: Problem) -> None:
    report = Report.load(problem.folder / "report_estimated.json")
    data = [(x, y) for (x, _), y in zip(problem.batches, problem.targets, strict=True)]
    H = curvature.hessian(problem.model, nn.MSELoss(), data).to_dense()
    assert_report(report, problem, nn.MSELoss(), problem.targets, "hessian", H)
    assert not report.traces["hessian"].trace.exact


def assert_report(report: Report, problem: Problem, loss_fn: nn.Module, y: list[Tensor], name: str, C: Tensor) -> None:
    """Against the loss and the matrix as they are computed now."""
    with torch.no_grad():
        loss = loss_fn(problem.model(torch.cat([x for x, _ in problem.batches])), torch.cat(y))
    assert report.loss.value == pytest.approx(float(loss), rel=1e-10)
    largest, trace = report.eigenvalues[name].largest, report.traces[name].trace
    assert len(largest) == report.k
    for found, true in zip(largest, torch.linalg.eigvalsh(C).flip(0).tolist(), strict=False):
        assert found.value == pytest.approx(true, rel=1e-10, abs=found.residual)
    assert trace.value == pytest.approx(float(C.trace()), rel=1e-10, abs=4 * trace.error)


# What is kept of long runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", SUMS)
def test_sums_are_not_made_again(problem: Problem, structure: str) -> None:
    found = sums(problem.model, problem.batches, structure, problem.folder / f"sums_{structure}.pt")
    assert problem.passes == 0
    assert_close(found, problem.expected[f"sums_{structure}"])
    assert_close(sums(problem.model, problem.batches, structure), found, rtol=1e-10)


def test_eigenpairs_are_not_searched_again(problem: Problem, tmp_path: Path) -> None:
    found = eigenpairs(problem.model, problem.batches, problem.folder / "eigenpairs.pt")
    products = len(found.values) + 1  # to compare with the file, and for the residuals
    assert problem.passes <= products * len(problem.batches)
    assert_close({"values": found.values, "vectors": found.vectors}, problem.expected["eigenpairs"])
    problem.passes = 0
    anew = eigenpairs(problem.model, problem.batches, tmp_path / "anew.pt")
    assert problem.passes > products * len(problem.batches)
    assert_close(anew.values, found.values, rtol=1e-9)


def test_influences_are_not_computed_again(problem: Problem) -> None:
    def run(**given: Any) -> dict[str, Tensor]:
        problem.passes = 0
        return dict(curvature.influence(problem.model, CE, problem.batches, problem.queries, **given).by_block)

    folder, expected = problem.folder / "influence", problem.expected["influence"]
    before = sorted(path.name for path in folder.iterdir())
    assert_close(run(store=folder), expected)
    assert problem.passes == 1, "the queries"
    assert sorted(path.name for path in folder.iterdir()) == before
    C = solvers.from_state(read(folder / "curvature.pt"))
    assert_close(run(curvature=C), expected, rtol=1e-10)
    assert problem.passes > 1


# Posteriors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", POSTERIORS)
def test_posteriors_predict_the_same(problem: Problem, structure: str) -> None:
    pytest.importorskip("laplace")
    from curvature.laplace import load

    x, _ = problem.queries
    la = load(problem.folder / f"posterior_{structure}.safetensors", problem.model)
    found = predictions(la, x)
    assert_close(found, problem.expected[f"posterior_{structure}"])
    assert_close(predictions(posterior(network(problem.values), problem.batches, structure), x), found, rtol=1e-8)
