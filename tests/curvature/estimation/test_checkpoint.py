"""Long runs: files that are whole, of one problem, and from which a run goes on to the identical result."""

from __future__ import annotations

import copy
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
from curvature.estimation import checkpoint
from curvature.estimation.checkpoint import Checkpoint, CheckpointError, digest, load, problem_identity, save
from curvature.estimation.snapshot import restore, take
from curvature.layers.block import Block, BlockPart
from curvature.structures.diagonal import DiagonalEstimator
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, Function

F64 = torch.float64


def same(left: Any, right: Any) -> bool:
    """Equal in structure and in every bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


# Files


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {
        "tensors": [torch.arange(6.0).reshape(2, 3)[:, 1:], torch.tensor(3), torch.tensor([True]), torch.zeros(0, 2)],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "numbers": (1, 2.5, True, None, float("inf")),
        "nested": {"text": "a", 3: {}},
    }
    save(tmp_path / "state.pt", state)
    assert same(load(tmp_path / "state.pt"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['model'\]\[1\] is a Linear. A checkpoint holds tensors"):
        save(tmp_path / "state.pt", {"model": [1, nn.Linear(2, 2)]})
    assert not any(tmp_path.iterdir())


def estimate() -> Any:
    part = BlockPart("p", 0, (3,), (0,), (3,))
    return DiagonalEstimator(Block("p", (part,)))


def test_estimates_come_back_from_a_file_with_all_they_hold(tmp_path: Path) -> None:
    before, after = estimate(), estimate()
    mean = WeightedMean()
    mean.add(torch.arange(3.0), 2.0)  # waits to be committed
    before.held = {"rows": [torch.ones(2), (1, "a", None)], (0, 1): {"mean": mean}}
    before.op, before.inner, after.inner = Dense(torch.eye(2)), estimate(), estimate()
    before.inner.mean.add(torch.ones(3), 1.0)
    save(tmp_path / "taken.pt", take(before))
    restore(after, load(tmp_path / "taken.pt"), torch.device("cpu"))
    assert same(after.held["rows"], before.held["rows"]) and after.inner is not before.inner
    assert torch.equal(after.op.matrix, before.op.matrix)
    assert same(take(after), take(before)) and after.held[0, 1]["mean"].step_sum()[1] == 2.0
    after.held["rows"][0].zero_()
    assert bool(before.held["rows"][0].all()), "a copy"


def test_what_an_estimate_cannot_store_is_named() -> None:
    odd = estimate()
    odd.held = {"hooks": [print]}
    with pytest.raises(TypeError, match=r"state\['DiagonalEstimator'\]\['held'\]\['hooks'\]\[0\] is a builtin"):
        take(odd)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    save(path, {"step": 1})

    def killed(state: Any, file: Any) -> None:
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"step": 2})
    monkeypatch.undo()
    assert load(path) == {"step": 1}
    save(path, {"step": 3})
    assert load(path) == {"step": 3} and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"state.pt is no checkpoint: it is damaged"):
        load(path)
    save(path, {"step": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)
    torch.save(nn.Linear(2, 2), path)  # holds code
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)
    save(path, {"step": 1})
    with pytest.raises(CheckpointError, match="no checkpoint of a computation"):
        Checkpoint(path).load()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Checkpoint(tmp_path / "absent" / "state.pt")
    with pytest.raises(ValueError, match="seconds"):
        Checkpoint(path, seconds=-1)


def test_all_differences_are_named(tmp_path: Path) -> None:
    file = Checkpoint(tmp_path / "state.pt")
    file.of({"k": 3, "loss": "MSELoss()", "same": 1}).save({"step": 1})
    assert file.of({"k": 3, "loss": "MSELoss()", "same": 1}).load() == {"step": 1}
    message = r"belongs to another computation. Different are k \(3 there, 4 here\), loss \('MSELoss\(\)' there"
    with pytest.raises(CheckpointError, match=message) as caught:
        file.of({"k": 4, "loss": "L1Loss()", "same": 1}).load()
    assert "same" not in str(caught.value)


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, took, saved = [0.0], [0.1], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow_save(path: Any, state: Any) -> None:
        now[0] += took[0]
        saved.append(now[0])

    monkeypatch.setattr(checkpoint, "save", slow_save)
    file = Checkpoint(tmp_path / "state.pt", seconds=10.0)
    while now[0] < 100:
        now[0] += 1.0
        file.offer(dict)
    assert saved[0] > 10 and len(saved) == 10, "every ten seconds, and not at the start"
    took[0] = 5.0
    before = len(saved)
    while now[0] < 1100:
        now[0] += 1.0
        file.offer(dict)
    assert (len(saved) - before) * took[0] <= 0.05 * 1000 + took[0]
    always = Checkpoint(tmp_path / "state.pt", seconds=0)
    assert all(always.offer(dict) for _ in range(3))


def test_hashes_tell_values_apart() -> None:
    x = torch.arange(12.0)
    assert digest([x]) == digest([x.clone()]) == digest([x.reshape(3, 4).mT.contiguous().mT.reshape(-1)])
    different = [digest(t) for t in ([x], [x + 1e-6], [x.double()], [x.reshape(3, 4)], [x[:6], x[6:]], [x[:0]], [])]
    assert len(set(different)) == len(different)
    assert digest([x], start=digest([x])) != digest([x])
    assert digest([torch.ones(2, dtype=torch.bfloat16), torch.tensor(1)])


def test_problems_are_told_apart() -> None:
    def identity(change: Any = None, loss: Any = None, params: Any = None) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        if change is not None:
            with torch.no_grad():
                change(model)
        return problem_identity(model, loss or nn.CrossEntropyLoss(), params)

    with torch.random.fork_rng():
        base = identity()
        assert base == identity()
        changes = {
            "values of the parameters": identity(lambda m: m[2].bias.add_(1e-6)),
            "buffers": identity(lambda m: m[1].running_mean.add_(1)),
            "train mode": identity(lambda m: m[1].eval()),
            "loss": identity(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
            "parameters": identity(params="2.*"),
        }
        assert "2.weight (2, 4) torch.float32" in base["parameters"]
        weighted = identity(loss=nn.CrossEntropyLoss(weight=torch.ones(2)))["loss"]
        assert len({weighted, base["loss"], identity(loss=nn.CrossEntropyLoss(weight=2 * torch.ones(2)))["loss"]}) == 3
    for name, other in changes.items():
        assert {key for key in base if base[key] != other[key]} == {name}


# Eigenpairs


def problem(seed: int = 0, batches: int = 3) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64) / 2
    data = [
        (torch.randn(n + 2, 5, generator=g, dtype=F64), torch.randint(3, (n + 2,), generator=g)) for n in range(batches)
    ]
    return model, nn.CrossEntropyLoss(), data


class Killed(Exception):
    """A process that ends after so and so many products."""


def mortal(op: solvers.LinearOperator, products: int) -> Function:
    left = [products]

    def product(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return op @ x

    return Function(product, op.in_shape, symmetric=True, dtype=op.dtype)


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_a_killed_run_goes_on_to_the_identical_pairs(tmp_path: Path, method: Any) -> None:
    op = solvers.Dense(curvature.hessian(*problem()).to_dense())
    file = Checkpoint(tmp_path / "run.pt", seconds=0)
    start = torch.ones(op.shape[0], dtype=F64)
    arguments: dict[str, Any] = dict(k=3, which="SA", method=method, v0=start, rtol=1e-10)
    whole = solvers.eigsh(op, **arguments)
    kills = 0
    while True:
        try:
            pairs = curvature.resumable_eigsh(mortal(op, 40), file, **arguments)
            break
        except Killed:
            kills += 1
            assert kills < 50, "it does not advance"
    assert kills >= 1
    assert torch.equal(pairs.values, whole.values) and torch.equal(pairs.vectors, whole.vectors)
    assert pairs.products == whole.products and pairs.complete
    again = curvature.resumable_eigsh(mortal(op, 4), file, **arguments)  # the probe, and the residuals of 3 pairs
    assert torch.equal(again.vectors, whole.vectors) and again.complete and again.products == whole.products
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_finished_run_goes_on_to_a_smaller_tolerance(tmp_path: Path) -> None:
    op = solvers.Dense(curvature.hessian(*problem()).to_dense())
    for basis_size in (8, 20, op.shape[0]):
        path = tmp_path / f"{basis_size}.pt"
        loose = curvature.resumable_eigsh(op, path, 3, rtol=1e-3, basis_size=basis_size)
        tight = curvature.resumable_eigsh(op, path, 3, rtol=1e-12, basis_size=basis_size)
        assert tight.products >= loose.products and tight.converged.all()
        expected = torch.linalg.eigvalsh(op.to_dense()).flip(0)[:3]
        torch.testing.assert_close(tight.values, expected, rtol=1e-12, atol=0)


def test_a_run_that_ran_out_of_products_goes_on(tmp_path: Path) -> None:
    op = solvers.Dense(curvature.hessian(*problem()).to_dense())
    whole = solvers.eigsh(op, 3, rtol=1e-10, basis_size=8)
    with pytest.warns(solvers.NotConvergedWarning):
        curvature.resumable_eigsh(op, tmp_path / "run.pt", 3, rtol=1e-10, basis_size=8, max_products=15)
    pairs = curvature.resumable_eigsh(op, tmp_path / "run.pt", 3, rtol=1e-10, basis_size=8)
    assert torch.equal(pairs.vectors, whole.vectors) and pairs.products == whole.products


def test_the_file_of_another_problem_is_refused(tmp_path: Path) -> None:
    model, loss_fn, data = problem()
    path = tmp_path / "run.pt"
    curvature.resumable_eigsh(curvature.hessian(model, loss_fn, data), path, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    refused: dict[str, tuple[Any, dict[str, Any]]] = {
        r"Different are values of the parameters \(": (curvature.hessian(other, loss_fn, data), {}),
        r"Different are loss \(": (curvature.hessian(model, nn.CrossEntropyLoss(label_smoothing=0.1), data), {}),
        r"Different are operator \('Hessian\(75x75\)' there, 'GaussNewton": (curvature.ggn(model, loss_fn, data), {}),
        "parameters": (curvature.hessian(model, loss_fn, data, params="0.*"), {}),
        r"Different are k \(3 there, 4 here\)": (curvature.hessian(model, loss_fn, data), {"k": 4}),
        r"Different are which \('LA' there, 'SA' here\)": (curvature.hessian(model, loss_fn, data), {"which": "SA"}),
        r"Different are v0 ": (curvature.hessian(model, loss_fn, data), {"v0": torch.ones(75, dtype=F64)}),
        "product with one fixed vector differs by .* the data are others": (
            curvature.hessian(model, loss_fn, data[:2]),
            {},
        ),
    }
    for message, (op, options) in refused.items():
        with pytest.raises(CheckpointError, match=message):
            curvature.resumable_eigsh(op, path, **{"k": 3, **options})
    with pytest.raises(ValueError, match="state= is kept in the file"):
        curvature.resumable_eigsh(curvature.hessian(model, loss_fn, data), path, 3, state={"k": torch.tensor(3)})


_RUN = """
import sys
from tests.curvature.estimation.test_checkpoint import slow_run
slow_run(sys.argv[1])
"""


def slow_run(path: str | Path) -> solvers.Eigenpairs:
    """A run of a few hundred products that takes a second at least."""
    values = torch.linspace(1, 30, 150, dtype=F64)

    def product(x: Tensor) -> Tensor:
        time.sleep(0.005)
        return x * values

    op = Function(product, (150,), symmetric=True, dtype=F64)
    return curvature.resumable_eigsh(op, Checkpoint(path, seconds=0), 3, basis_size=12, rtol=1e-7)


def test_sigkill(tmp_path: Path) -> None:
    root, path = Path(__file__).resolve().parents[3], tmp_path / "run.pt"
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(path)], cwd=root)
    deadline = time.monotonic() + 240
    while not path.exists():  # the first steps are kept
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed too late"
    steps = int(load(path)["state"]["run"]["products"])
    resumed, whole = slow_run(path), slow_run(tmp_path / "whole.pt")
    assert 10 <= steps < whole.products == resumed.products
    assert torch.equal(resumed.values, whole.values) and torch.equal(resumed.vectors, whole.vectors)
