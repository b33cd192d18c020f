"""Influences that were killed go on where they were, to identical results, and curvature is used again."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
import solvers
from curvature import Checkpoint, CheckpointError
from curvature.estimation.checkpoint import load
from tests.curvature.estimation.test_resume_sums import Killed, Mortal
from tests.curvature.problems import PROBLEMS, Problem, normal


def until_done(run: Any, data: Any, path: Path, lives: int = 1) -> tuple[Any, int]:
    """The result of a run that is killed after a batch, then after two, and so on; and how often it was."""
    kills = 0
    while True:
        try:
            return run(Mortal(data, lives + kills), store=Checkpoint(path, seconds=0)), kills
        except Killed:
            kills += 1
            torch.manual_seed(kills + 5)  # a new process has other random numbers


def assert_identical(left: curvature.Influence, right: curvature.Influence) -> None:
    assert torch.equal(left.scores, right.scores) and left.total == right.total
    for a, b in ((left.by_block, right.by_block), (left.by_position, right.by_position), (left.dropped, right.dropped)):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"by_position": True}, {"query_rank": 1}, {"memory": "two"}], ids=str)
@pytest.mark.parametrize("name", ["mlp_ce_all_options", "language_model", "cnn"])
def test_all_stages_resume(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = PROBLEMS[name]()
    made.data.extend(made.data[:1])
    size = sum(p.numel() for p in made.model.parameters())
    options = {key: 8 * 2 * size if value == "two" else value for key, value in options.items()}

    def run(data: Any, **more: Any) -> curvature.Influence:
        torch.manual_seed(1)
        given = {"class_dim": made.class_dim, "progress": False, **options, **more}
        return curvature.influence(made.model, made.loss_fn, data, made.data[:1], **given)

    whole = run(made.data)
    resumed, kills = until_done(run, made.data, tmp_path / "run")
    # Two passes for the factors, one for the scores, a batch more each time.
    assert kills >= 3
    assert_identical(resumed, whole)
    assert_identical(run(made.data, store=tmp_path / "run"), whole)


class Trained(nn.Module):
    """Buffers that change and random numbers: what a run that goes on must restore."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("memory", [None, 8 * 31 * 5])
@pytest.mark.filterwarnings("ignore:not one loss")
def test_dropout_and_buffers(memory: int | None, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Trained().double()
        assert sum(p.numel() for p in model.parameters()) < 8 * 31 * 5
        x, y = normal(14, 3), torch.randint(3, (14,))
        batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 14, 4)]
        queries = [(x[:3], y[:3]), (x[3:5], y[3:5])]
        before = copy.deepcopy(model.state_dict())

        def run(data: Any, **more: Any) -> curvature.Influence:
            torch.manual_seed(more.pop("seed", 1))
            return curvature.influence(model, nn.CrossEntropyLoss(), data, queries, memory=memory, **more)

        memory = None if memory is None else 8 * sum(p.numel() for p in model.parameters()) * 3
        whole = run(batches)
        assert whole.scores.shape == (5, 14)
        resumed, kills = until_done(run, batches, tmp_path / "run")
        assert kills >= 4
        assert_identical(resumed, whole)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), "buffers are as they were"


def test_a_run_killed_between_groups_of_queries_goes_on_in_another_process(tmp_path: Path) -> None:
    """The new process begins with other random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 3).double()
        x, y = normal(9, 3), torch.randint(3, (9,))
        batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 9, 4)]
        C = curvature.ggn(model, nn.CrossEntropyLoss(), (x, y), structure="ekfac")
        given: dict[str, Any] = {"curvature": C, "memory": 8 * 12}  # a query at a time
        torch.manual_seed(1)
        whole = curvature.influence(model, nn.CrossEntropyLoss(), batches, (x[:2], y[:2]), **given)
        torch.manual_seed(1)
        given["store"] = Checkpoint(tmp_path / "run", seconds=0)
        with pytest.raises(Killed):
            curvature.influence(model, nn.CrossEntropyLoss(), Mortal(batches, 3), (x[:2], y[:2]), **given)
        torch.manual_seed(2)
        resumed = curvature.influence(model, nn.CrossEntropyLoss(), batches, (x[:2], y[:2]), **given)
        assert_identical(resumed, whole)


def test_self_influence_resumes(tmp_path: Path) -> None:
    made = PROBLEMS["cnn"]()
    made.data.extend(made.data[:1])

    def run(data: Any, **more: Any) -> Tensor:
        return curvature.self_influence(made.model, made.loss_fn, data, progress=False, **more)

    whole = run(made.data)
    resumed, kills = until_done(run, made.data, tmp_path / "run")
    assert kills >= 3
    assert torch.equal(resumed, whole)


def test_curvature_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = PROBLEMS["cnn"]()
    arguments = (made.model, made.loss_fn, made.data)
    x, y = made.data[0]
    folder = tmp_path / "run"
    first = curvature.influence(*arguments, (x, y), store=folder)
    stored = load(folder / "curvature.pt")
    assert_identical(curvature.influence(*arguments, (x, y), curvature=solvers.from_state(stored)), first)
    expected = curvature.influence(*arguments, (x[:1], y[:1]))
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def dead(*_: Any, **__: Any) -> None:
        raise AssertionError("the factors were estimated again")

    monkeypatch.setattr(curvature.structures.ekfac.EigenbasisEstimator, "update", dead)
    assert_identical(curvature.influence(*arguments, (x[:1], y[:1]), store=folder), expected)
    curvature.influence(*arguments, (x[:1], y[:1]), store=folder, damping=0.3)  # another file, not an error
    now = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert written.items() <= now.items(), "nothing that was there is written again"
    assert len(now) == len(written) + 2


def test_other_problems_are_refused(tmp_path: Path) -> None:
    made = PROBLEMS["cnn"]()
    folder = tmp_path / "run"
    curvature.influence(made.model, made.loss_fn, made.data, made.data, store=folder)
    other = copy.deepcopy(made.model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-6)
    with pytest.raises(CheckpointError, match="Different are values of the parameters"):
        curvature.influence(other, made.loss_fn, made.data, made.data, store=folder)
    changed = [(x + 1e-6, y) for x, y in made.data]
    with pytest.raises(CheckpointError, match="Different are data"):
        curvature.influence(made.model, made.loss_fn, changed, made.data, store=folder)
    C = curvature.ggn(made.model, made.loss_fn, made.data, structure="ekfac")
    given = {"curvature": C, "store": tmp_path / "given"}
    curvature.influence(made.model, made.loss_fn, made.data, made.data, **given)
    with pytest.raises(CheckpointError, match="Different are data"):
        curvature.influence(made.model, made.loss_fn, changed, made.data, **given)
    with pytest.raises(FileNotFoundError, match="no folder"):
        curvature.influence(made.model, made.loss_fn, made.data, made.data, store=tmp_path / "a" / "b")


SCRIPT = """
import sys, time, torch
import curvature
from tests.curvature.influences.test_resume import slow_problem
from pathlib import Path
model, loss_fn, data, queries = slow_problem(float(sys.argv[2]))
print("ready", flush=True)
found = curvature.influence(model, loss_fn, data, queries, by_position=True, memory=40_000,
                            store=curvature.Checkpoint(sys.argv[1], seconds=0), progress=False)
torch.save([found.scores, found.by_token], Path(sys.argv[1]).with_suffix(".result"))
"""


class Slow:
    """Batches that take their time, so that a signal hits anywhere."""

    def __init__(self, batches: list[Any], seconds: float) -> None:
        self.batches, self.seconds = batches, seconds

    def __iter__(self) -> Any:
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


def slow_problem(seconds: float) -> tuple[nn.Module, nn.Module, Any, Any]:
    made: Problem = PROBLEMS["language_model"]()
    made.model.to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randint(5, (3, 4), generator=generator) for _ in range(2)) for _ in range(6)]
    return made.model, made.loss_fn, Slow(batches, seconds), batches[:2]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a signal that kills")
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL, wherever it hits."""
    path = tmp_path / "run"

    def start(seconds: float, path: Path = path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(path), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    kills = 0
    for wait in (0.3, 1.2):
        process = start(0.1)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills, "no run lived to be killed"
    for where in (path, tmp_path / "whole"):
        process = start(0.0, where)
        assert process.communicate()[0] == "ready\n" and process.returncode == 0
    resumed, whole = (torch.load(tmp_path / f"{name}.result") for name in ("run", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
