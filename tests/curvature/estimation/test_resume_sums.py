"""Sums over a data set that were killed go on at the right batch, to the identical matrix."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature
from curvature import Checkpoint, CheckpointError
from curvature.estimation.checkpoint import load
from curvature.structures.blocks import BLOCKS
from tests.curvature.problems import PROBLEMS, Problem


class Killed(Exception):
    """The end of a process."""


class Mortal(list[Any]):
    """Batches that end with the process after so and so many."""

    def __init__(self, batches: Any, lives: int) -> None:
        super().__init__(batches if isinstance(batches, list) else [])
        self.batches, self.lives = batches, lives

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            yield batch


def conv() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(18, 3)
    ).double()
    data: list[tuple[Any, Tensor]] = [(torch.randn(n, 1, 5, 5).double(), torch.randint(3, (n,))) for n in (3, 5, 2, 4)]
    return Problem(model, nn.CrossEntropyLoss(), data)


def assert_resumes(made: Problem, lives: int, path: Path, **options: Any) -> int:
    """Against the run that was never killed, which gives the number of kills."""

    def run(data: Any, **more: Any) -> Any:
        torch.manual_seed(1)  # masks of dropout
        return curvature.fisher(made.model, made.loss_fn, data, class_dim=made.class_dim, **options, **more)

    whole = run(made.data)
    before = copy.deepcopy(made.model.state_dict())
    kills = 0
    while True:
        try:
            resumed = run(Mortal(made.data, lives + kills), resume=Checkpoint(path, seconds=0))
            break
        except Killed:
            kills += 1
            torch.manual_seed(kills + 5)  # a new process has other random numbers
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, before[name]), "buffers are as they were"
    assert torch.equal(resumed.to_dense(), whole.to_dense())
    read = run(made.data, resume=path)  # nothing is evaluated
    assert torch.equal(read.to_dense(), whole.to_dense())
    return kills


@pytest.mark.parametrize("structure", sorted(BLOCKS))
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_every_structure_resumes(structure: Any, kind: Any, tmp_path: Path) -> None:
    made = PROBLEMS["mlp_ce_all_options"]()
    made.data.extend(made.data[:1])
    assert assert_resumes(made, 1, tmp_path / "run.pt", structure=structure, kind=kind) >= 2


@pytest.mark.filterwarnings("ignore:not one loss")
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_and_dropout(structure: Any, train: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        made = conv()
        made.model.train(train)
        assert assert_resumes(made, 1, tmp_path / "run.pt", structure=structure, kind="mc", samples=2) >= 3
        assert_resumes(made, 1, tmp_path / "mixed.pt", structure={"*": "diagonal", nn.Conv2d: structure}, kind="mc")


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_every_model_resumes(name: str, tmp_path: Path) -> None:
    made = PROBLEMS[name]()
    if len(made.data) < 2:
        pytest.skip("one batch")
    assert assert_resumes(made, 3, tmp_path / "run.pt", structure="ekfac", kind="mc") >= 1


def test_a_loader_that_shuffles_goes_on_in_its_order(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        made = conv()
        made.model.eval()
        x, y = (torch.cat(parts) for parts in zip(*made.data, strict=True))
        loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
        for structure in ("kfac", "ekfac"):
            problem = Problem(made.model, made.loss_fn, loader)  # type: ignore[arg-type]
            assert assert_resumes(problem, 2, tmp_path / f"{structure}.pt", structure=structure, kind="mc") >= 2


def test_looking_at_a_loader_draws_no_random_numbers() -> None:
    made = PROBLEMS["mlp_ce"]()
    x, y = made.data[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    curvature.fisher(made.model, made.loss_fn, loader, structure="ekfac")
    curvature.hessian(made.model, made.loss_fn, loader) @ torch.zeros(43, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)


def test_killed_between_passes_and_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        made = conv()
        made.model.eval()
        batches = len(made.data)
        # The first run ends with the first pass; the second one goes through the last pass, but dies before it is kept.
        whole = curvature.fisher(made.model, made.loss_fn, made.data, structure="ekfac")
        file = Checkpoint(tmp_path / "run.pt", seconds=0)
        with pytest.raises(Killed):
            curvature.fisher(made.model, made.loss_fn, Mortal(made.data, batches), structure="ekfac", resume=file)
        assert load(file.path)["state"]["number"] == 0 and load(file.path)["state"]["count"] == batches

        def dead(self: Any, state: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "offer", lambda self, state: False)
            patch.setattr(Checkpoint, "save", dead)
            with pytest.raises(Killed):
                curvature.fisher(made.model, made.loss_fn, made.data, structure="ekfac", resume=file)
        resumed = curvature.fisher(made.model, made.loss_fn, made.data, structure="ekfac", resume=file)
        assert torch.equal(resumed.to_dense(), whole.to_dense())


def test_other_data_are_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        made = conv()
        made.model.eval()
        path = tmp_path / "run.pt"
        with pytest.raises(Killed):
            file = Checkpoint(path, seconds=0)
            curvature.fisher(made.model, made.loss_fn, Mortal(made.data, 3), resume=file, structure="kfac")
        changed = [(x + 1e-6, y) if i == 1 else (x, y) for i, (x, y) in enumerate(made.data)]
        labels = [(x, (y + 1) % 3) if i == 0 else (x, y) for i, (x, y) in enumerate(made.data)]
        wrong: list[Any] = [changed, labels, made.data[:2], made.data[::-1]]
        for data in wrong:
            with pytest.raises(CheckpointError, match=r"Different are data \('other batches' there, 'these' here\)"):
                curvature.fisher(made.model, made.loss_fn, data, resume=path, structure="kfac")
        curvature.fisher(made.model, made.loss_fn, made.data, resume=path, structure="kfac")
        for data in wrong:
            with pytest.raises(CheckpointError, match="Different are data"):
                curvature.fisher(made.model, made.loss_fn, data, resume=path, structure="kfac")


def test_other_problems_are_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        made = conv()
        made.model.eval()
        path = tmp_path / "run.pt"
        curvature.fisher(made.model, made.loss_fn, made.data, resume=path, structure="kfac")
        other = copy.deepcopy(made.model)
        with torch.no_grad():
            next(other.parameters()).add_(1e-6)
        refused: dict[str, dict[str, Any]] = {
            "values of the parameters": {"model": other},
            "loss": {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)},
            r"curvature \(.KroneckerFisher.* there, .DiagonalFisher": {"structure": "diagonal"},
            r"curvature \(.*mc.* there, .*exact.* here": {"kind": "exact"},
            "curvature": {"samples": 2},
            "draws": {"generator": torch.Generator().manual_seed(1)},
            "parameters": {"params": "0.*"},
        }
        for message, change in refused.items():
            problem = {"model": made.model, "loss_fn": made.loss_fn, "data": made.data}
            arguments: dict[str, Any] = {**problem, "structure": "kfac", "resume": path, **change}
            with pytest.raises(CheckpointError, match=f"Different are {message}"):
                curvature.fisher(**arguments)
        with pytest.raises(ValueError, match=r"structure='full' keeps no sums.*resumable_eigsh"):
            curvature.ggn(made.model, made.loss_fn, made.data, resume=path)


class Growing(nn.Module):
    """A buffer that a longer input makes longer, beside one of which it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.length = nn.Linear(4, 3), 0
        self.register_buffer("table", torch.ones(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.table = torch.arange(1.0, self.length + 1)[:, None]
            self.register_buffer("scale", 1 / self.table)
        return self.linear(x * self.table[: x.shape[1]] * self.scale[: x.shape[1]].sqrt()).mean(1)


def test_buffers_that_a_pass_makes_or_grows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data: list[tuple[Any, Tensor]] = [(torch.randn(3, n, 4), torch.randint(3, (3,))) for n in (2, 5, 3)]
    made = Problem(Growing(), nn.CrossEntropyLoss(), data)
    assert assert_resumes(made, 1, tmp_path / "run.pt", structure="ekfac") >= 2
