"""Can everything be compared that is a report, nothing else, and is said what else differs?"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvature
from curvature.cli import main
from curvature.reports import Report
from tests.curvature.problems import normal
from tests.curvature.reports.test_page import Page

X, Y = normal(12, 4), torch.arange(12) % 3


def network(hidden: int = 5) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, hidden), nn.Dropout(0.0), nn.Tanh(), nn.Linear(hidden, 3))
    return made.double().eval()


def made(model: nn.Module | None = None, loss: nn.Module | None = None, data: Any = (X, Y), **options: Any) -> Report:
    given: dict[str, Any] = {"k": 3, "progress": False, "sections": ["trace", "eigenvalues", "density"], **options}
    return curvature.report(model or network(), loss or nn.CrossEntropyLoss(), data, **given)


@cache
def first() -> Report:
    """The one that others are compared with."""
    return made()


@pytest.fixture(scope="module")
def course() -> list[Report]:
    """Reports along a training run."""
    model, found = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(6):
        found.append(made(model, sections=None))
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    return found


# What else differs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "said"),
    [
        pytest.param(lambda: made(network().train()), r"other modes: eval \(A\), train \(B\)", id="mode"),
        pytest.param(lambda: made(data=(X + 1e-3, Y)), r"the data of B are not those of A", id="inputs"),
        pytest.param(lambda: made(data=(X, (Y + 1) % 3)), r"the data of B are not those of A", id="targets"),
        pytest.param(lambda: made(data=(X[:9], Y[:9])), r"other numbers of examples: 12 \(A\), 9 \(B\)", id="examples"),
        pytest.param(
            lambda: made(loss=nn.CrossEntropyLoss(reduction="sum")), r"other losses: CrossEntropyLoss", id="loss"
        ),
        pytest.param(lambda: made(network(6)), r"other numbers of parameters: 43 \(A\), 51 \(B\)", id="model"),
        pytest.param(lambda: made(damping=0.1), r"other dampings: 0.001 \(A\), 0.1 \(B\) .*left out", id="damping"),
        pytest.param(lambda: made(params="0.*"), r"layers of A or B only: 3", id="parameters"),
    ],
)
def test_reports_that_differ_in_more_than_parameters_are_told(other: Any, said: str) -> None:
    with pytest.warns(curvature.NotComparableWarning, match=said):
        found = curvature.compare(first(), other())
    assert any(word in str(found) for word in ("Not comparable in this",)) and found.obstacles
    assert "Not comparable in this" in found.to_html()


def test_order_batches_and_seed_do_not_matter() -> None:
    turned = torch.arange(11, -1, -1)
    other = made(data=[(X[turned[:5]], Y[turned[:5]]), (X[turned[5:]], Y[turned[5:]])], exact=False, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = curvature.compare(made(exact=False), other)
    assert found.obstacles == () and any("other seeds: 0 (A), 4 (B)" in remark for remark in found.remarks)
    equal = curvature.compare(made(exact=False), made(exact=False))
    assert any("equal seeds drew equal random vectors" in remark for remark in equal.remarks)


def test_what_depends_on_the_damping_needs_the_same() -> None:
    with pytest.warns(curvature.NotComparableWarning):
        found = curvature.compare(made(), made(damping=0.1))
    assert not {"effective dimension", "condition"} & {q.name for q in found.quantities}
    assert {"effective dimension", "condition"} <= {q.name for q in curvature.compare(made(), made()).quantities}


def test_a_report_of_an_older_version_is_compared_with_a_word() -> None:
    content = made().to_dict()
    del content["setting"]
    with pytest.warns(curvature.NotComparableWarning, match="B does not say its mode and data"):
        found = curvature.compare(made(), Report.from_dict(content))
    assert found.of("trace")


# Doors ----------------------------------------------------------------------------------------------------------------


def test_files_objects_and_lists_are_one(course: list[Report], tmp_path: Path) -> None:
    course[0].save(tmp_path / "before.json")
    course[-1].save(tmp_path / "after.pt")
    objects = curvature.compare(course[0], course[-1], names=["before", "after"])
    files = curvature.compare(tmp_path / "before.json", str(tmp_path / "after.pt"))
    listed = curvature.compare([tmp_path / "before.json", course[-1]], names=("before", "after"))
    assert objects.to_dict() == files.to_dict() == listed.to_dict()
    assert curvature.compare(course[0], course[-1]).names == ("A", "B")
    (tmp_path / "x").mkdir()
    course[1].save(tmp_path / "x" / "before.json")
    two = curvature.compare(tmp_path / "before.json", tmp_path / "x" / "before.json").names
    assert two == (str(tmp_path / "before.json"), str(tmp_path / "x" / "before.json"))


def test_what_is_no_report_is_refused(course: list[Report], tmp_path: Path) -> None:
    first = course[0]
    first.save(tmp_path / "page.html")
    (tmp_path / "other.json").write_text('{"a": 1}')
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"a comparison takes two reports or more, got 1"):
        curvature.compare(first)
    with pytest.raises(TypeError, match=r"one of curvature\.report, or the \.json or \.pt file.* not a Linear"):
        curvature.compare(first, nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"page\.html is a page for people.* save the report as \.json"):
        curvature.compare(first, tmp_path / "page.html")
    for name in ("other.json", "weights.pt"):
        with pytest.raises(curvature.CheckpointError, match=rf"{name} is no"):
            curvature.compare(first, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        curvature.compare(first, tmp_path / "gone.json")
    for names in (["a"], ["a", "a"], "ab"):
        with pytest.raises(ValueError, match="names are 2 different ones, one for each report"):
            curvature.compare(first, first, names=names)


def test_the_course_of_a_training_run(course: list[Report], tmp_path: Path) -> None:
    names = [f"step {5 * i}" for i in range(6)]
    found = curvature.compare(course, names=names)
    for quantity in found.quantities:
        assert len(quantity.values) == len(quantity.differences) == 6 and quantity.differences[0] is None
    assert [value.value for value in found.of("loss")[0].values] == [r.loss.value for r in course]  # type: ignore[union-attr]
    lines = str(found).splitlines()
    table = lines[lines.index("Loss and curvature, report by report") :]
    assert [row[:7].strip() for row in table if row.startswith("step")][:6] == names
    assert max(map(len, lines)) <= 100
    page = Page(found.to_html())
    assert len([attrs for attrs in page.all("svg") if "aria-label" in attrs]) == 7  # course, densities, eigenvalues
    assert page.all("script") == [] and page.all("img") == []
    ids = [attrs["id"] for _, attrs in page.seen if attrs.get("id")]
    assert len(set(ids)) == len(ids)
    found.save(tmp_path / "course.json")
    written = json.loads((tmp_path / "course.json").read_text())
    assert written == found.to_dict() and written["names"] == names
    row = next(row for row in written["quantities"] if row["name"] == "loss")
    assert row["differences"][5]["differs"] is True and row["differences"][5]["in_errors"] is None
    with pytest.raises(ValueError, match=r"a comparison is saved as \.html or \.json, not '\.pt'"):
        found.save(tmp_path / "course.pt")
    assert "6 quantities" not in repr(found) and repr(found).startswith("Comparison(step 0, step 5")


def test_without_matplotlib_the_page_says_so(course: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    text = curvature.compare(course[0], course[1]).to_html()
    assert "precond[plot]" in text and "<svg" not in text


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(course: list[Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    course[0].save("before.json")
    course[-1].save("after.pt")


@pytest.mark.usefixtures("files")
def test_the_command_prints_what_the_function_finds(capsys: pytest.CaptureFixture[str]) -> None:
    found = curvature.compare("before.json", "after.pt")
    assert main(["compare", "before.json", "after.pt", "-o", "page.html", "--out", "numbers.json"]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert Path("page.html").read_text() == found.to_html()
    assert json.loads(Path("numbers.json").read_text()) == found.to_dict()
    assert main(["compare", "before.json", "after.pt", "before.json", "--names", "a", "b", "c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["a", "b", "c"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["before.json"], 2, "a comparison takes two reports or more, got before.json only"),
        (["before.json", "gone.json"], 2, "there is no file gone.json"),
        (["before.json", "after.pt", "-o", "a.pdf"], 2, "--out takes .html or .json, not 'a.pdf'"),
        (["before.json", "after.pt", "-o", "no/a.html"], 2, "there is no folder no"),
        (["before.json", "after.pt", "--names", "a"], 2, "--names takes 2 different names"),
        (["before.json", "other.json"], 1, "other.json is no curvature report"),
    ],
)
def test_a_command_that_makes_no_sense_is_told_in_one_line(
    argv: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.json").write_text("[]")
    assert main(["compare", *argv]) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.usefixtures("files")
def test_the_command_warns_of_what_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    made(data=(X + 1, Y)).save("other.json")
    assert main(["compare", "before.json", "other.json"]) == 0
    assert (
        "curvature: warning: these reports differ in more than the parameters: the data of" in capsys.readouterr().err
    )
