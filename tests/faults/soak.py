"""Long runs that are killed at random moments, and thousands of calls: ``python -m tests.faults.soak [NAME ...]``.

A run is a process of its own, which writes a checkpoint every so many steps, as a user's loop does. The parent kills it
by SIGKILL, starts it again, and compares its last checkpoint with that of a run that nobody killed, bit for bit: the
curve of losses, the parameters, the optimizer, the schedule, the stream of random numbers.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvature
from precond import EKFAC, KFAC, SOAP
from solvers.files import write_whole
from solvers.tree import pieces
from tests.faults.injection import same

ROOT = Path(__file__).resolve().parents[2]
LOSS = nn.CrossEntropyLoss()

PERIODS: dict[str, Any] = {"curvature_update_period": 4, "inverse_update_period": 20}
#: Without the bound on a step, the learning rate and its schedule decide.
LAYERWISE: dict[str, Any] = {"lr": 0.02, "damping": 0.03, "kl_clip": None, "weight_decay": 1e-3, **PERIODS}

#: Name -> the precision of the model, and its optimizer.
METHODS: dict[str, tuple[torch.dtype, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "KFAC": (torch.float64, lambda model: KFAC(model, LOSS, **LAYERWISE)),
    "EKFAC": (torch.float32, lambda model: EKFAC(model, LOSS, **LAYERWISE)),
    "SOAP": (torch.float32, lambda model: SOAP(model.parameters(), lr=3e-3, weight_decay=1e-2)),
}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def objects() -> int:
    """Python's live objects that can hold others, tensors among them, once what hangs together alone is collected."""
    gc.collect()
    return len(gc.get_objects())


class Training:
    """A noisy classification by a small network with dropout, two batches to a step, and a falling learning rate.

    Batches and dropout are drawn from the stream of the process, so a resumed run needs that as well.
    """

    def __init__(self, name: str, steps: int) -> None:
        dtype, make = METHODS[name]
        torch.manual_seed(0)
        self.x = torch.randn(256, 8, dtype=dtype)
        self.y = (self.x @ torch.randn(8, 4, dtype=dtype) + torch.randn(256, 4, dtype=dtype)).argmax(1)
        self.model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 4)).to(dtype)
        self.optimizer = make(self.model)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses, self.done = torch.zeros(steps, dtype=torch.float64), 0

    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(2):
            rows = torch.randint(256, (16,))
            loss = LOSS(self.model(self.x[rows]), self.y[rows]) / 2
            loss.backward()
            self.losses[self.done] += loss.detach()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "done": self.done,
            "stream": torch.get_rng_state(),
        }
        write_whole(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.done = state["losses"], state["done"]
        torch.set_rng_state(state["stream"])


def contents(path: Path) -> list[Any]:
    """Everything in a checkpoint."""
    return [item for _, item in pieces(torch.load(path, weights_only=True)) if not isinstance(item, dict)]


def train(name: str, steps: int, path: Path, every: int) -> None:
    """The process of a run: goes on from the file if there is one, and tells on its output what it does."""
    run = Training(name, steps)
    if path.exists():
        run.load(path)
    print("from", run.done, flush=True)
    while run.done < steps:
        run.step()
        if run.done % every == 0:
            print("save", run.done, resident(), objects(), flush=True)
            run.save(path)
    print("end", run.done, flush=True)


@dataclass
class Lived:
    """What a process did before it ended or was killed: where it began, and its size whenever it wrote its file."""

    first: int
    sizes: list[tuple[int, int, int]]
    """Steps, bytes, objects."""
    ended: bool
    seconds: float


def live(
    name: str, steps: int, path: Path, every: int, kill: tuple[str, float] | None = None, occurrence: int = 1
) -> Lived:
    """Start or resume a run as a process.

    Args:
        name: The method.
        steps: Of the whole run.
        path: Its checkpoint.
        every: So many steps lie between two checkpoints.
        kill: Seconds after a line that begins with a word (``"from"``, ``"save"``) in which it is killed.
        occurrence: Of how many such lines that is the last.
    """
    command = [sys.executable, "-m", "tests.faults.soak", "train", name, str(steps), str(path), str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    first, sizes, ended, timer, start = 0, [], False, None, time.monotonic()
    for line in process.stdout:
        word, *numbers = line.split()
        if word == "from":
            first, start = int(numbers[0]), time.monotonic()
        elif word == "save":
            sizes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
        ended |= word == "end"
        occurrence -= kill is not None and word == kill[0]
        if kill is not None and timer is None and occurrence == 0:
            timer = threading.Timer(kill[1], process.kill)
            timer.start()
    process.wait()
    if timer is not None:
        timer.cancel()
    process.stdout.close()
    if process.returncode not in (0, -9):
        raise RuntimeError(f"the run of {name} ended with {process.returncode}")
    return Lived(first, sizes, ended, time.monotonic() - start)


@dataclass
class Killed:
    """A run that was killed and resumed until it was done."""

    kills: int
    old: int
    """Kills that came before a checkpoint that was on its way had its name, and left the one before."""
    same: bool
    """Bit for bit the run without kills."""


def killed(name: str, steps: int, folder: Path, every: int, kills: int, pace: float) -> Killed:
    """Kill a run at random moments, every second time while it writes its file, and compare it with its twin.

    Args:
        name: The method.
        steps: Of the whole run; that without a kill lies in the folder.
        folder: Where the files are.
        every: So many steps lie between two checkpoints.
        kills: At most so many.
        pace: Seconds between two checkpoints, when nothing happens.
    """
    path, draw, lives = folder / f"{name} killed.pt", random.Random(name), []
    for number in range(kills):
        kill = ("save", draw.uniform(0, 0.004)) if number % 2 else ("from", draw.uniform(0, 4 * pace))
        lives.append(live(name, steps, path, every, kill))
        if lives[-1].ended:
            break
    else:
        lives.append(live(name, steps, path, every))
    if not lives[-1].ended:
        raise RuntimeError(f"the run of {name} did not end")
    old = sum(after.first < before.sizes[-1][0] for before, after in pairwise(lives) if before.sizes)
    return Killed(len(lives) - 1, old, same(contents(folder / f"{name}.pt"), contents(path)))


def problem(seed: int) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A new model with its loss and data, so that a call that keeps one is seen."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=generator)
    return model, LOSS, [(x[:4], y[:4]), (x[4:], y[4:])]


def call_report(number: int) -> None:
    curvature.report(*problem(number), sections=("eigenvalues", "trace"), matrix="ggn", k=1, seed=0, progress=False)


STRUCTURES = ("kfac", "ekfac", "diagonal", "layer", "full")


def call_fisher(number: int) -> None:
    structure, kind = STRUCTURES[number % 5], ("exact", "mc", "empirical")[number % 3]
    matrix = curvature.fisher(*problem(number), structure=structure, kind=kind, progress=False)  # type: ignore[arg-type]
    matrix @ torch.ones(matrix.shape[1], dtype=matrix.dtype)


CALLS: dict[str, Callable[[int], None]] = {"report": call_report, "fisher": call_fisher}


def sizes_of_calls(name: str, calls: int, every: int) -> list[tuple[int, int, int]]:
    """Calls, bytes and objects, so many calls apart."""
    found = []
    for number in range(1, calls + 1):
        CALLS[name](number)
        if number % every == 0:
            found.append((number, resident(), objects()))
    return found


def growth(sizes: list[tuple[int, int, int]], warm: int) -> tuple[int, int]:
    """Growth from the first size after a warm-up: bytes, objects."""
    after = [size for size in sizes if size[0] >= warm]
    return after[-1][1] - after[0][1], after[-1][2] - after[0][2]


def sizes_in_words(sizes: list[tuple[int, int, int]], warm: int) -> str:
    first, last = next(size for size in sizes if size[0] >= warm), sizes[-1]
    return (
        f"{first[1] / 2**20:.2f} MiB and {first[2]:,} objects after {first[0]:,}, "
        f"{last[1] / 2**20:.2f} MiB and {last[2]:,} objects at the end"
    )


def runs(names: Iterable[str], steps: int, every: int, kills: int) -> Iterable[tuple[str, Lived, Killed]]:
    """Each method once as it is, and once with kills."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            whole = live(name, steps, Path(folder) / f"{name}.pt", every)
            again = killed(name, steps, Path(folder), every, kills, whole.seconds * every / steps)
        yield name, whole, again


def main(words: list[str]) -> None:
    """Everything, as tables; or the process of one run."""
    torch.set_num_threads(1)
    match words:
        case ["train", name, steps, path, every]:
            train(name, int(steps), Path(path), int(every))
        case ["calls", name, calls, every]:
            print(json.dumps(sizes_of_calls(name, int(calls), int(every))))
        case _:
            for name, whole, again in runs([n for n in METHODS if n in words or not words], 10_000, 500, 10):
                print(f"{name}: 10,000 steps, {sizes_in_words(whole.sizes, 1000)};", end=" ")
                print(f"{again.kills} kills, {again.old} of them left the checkpoint before;", end=" ")
                print("bit for bit the same" if again.same else "ANOTHER RUN", flush=True)
            for name in CALLS:
                if name in words or not words:
                    print(f"{name}: 3,000 calls, {sizes_in_words(calls_apart(name, 3000, 500), 500)}", flush=True)


def calls_apart(name: str, calls: int, every: int) -> list[tuple[int, int, int]]:
    """The same in a process of its own, whose memory nothing else moves."""
    command = [sys.executable, "-m", "tests.faults.soak", "calls", name, str(calls), str(every)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [(n, size, count) for n, size, count in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main(sys.argv[1:])
