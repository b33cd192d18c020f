"""Steps to the loss of tuned Muon on a character transformer: the parts of 2026, one by one and together.

    python -m tests.benchmarks.frontier [--only SOAPMuon SOAP-H] [--parts 0.85 0.96] [--seeds 5] [--out FILE]

The test is that of Track 3 of modded-nanogpt: model, data and batch are fixed; the target is the mean held-out loss
over the seeds of Muon after :data:`STEPS` steps, at the settings that are best in a grid on the first seed; and a
method passes at a number of steps if its mean over the same seeds is at the target after a run with the schedule of
that length. Runs are kept in ``--out``, a line each, and are not made again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import precond
from tests.benchmarks.calls import read_call

TRAIN = (
    *("argparse", "ast", "dis", "tokenize", "typing", "inspect", "difflib", "pydoc", "tarfile", "zipfile", "turtle"),
    *("subprocess", "threading", "socket", "ftplib", "fractions", "unittest.mock", "doctest", "pickle", "enum"),
    *("optparse", "configparser", "codecs", "heapq", "ssl", "platform", "mailbox", "imaplib", "smtplib", "calendar"),
)
HELD_OUT = ("logging", "shutil", "statistics", "urllib.request")
CONTEXT, BATCH, WIDTH, DEPTH, HEADS = 32, 48, 64, 2, 4
STEPS = 240

Method = tuple[str, dict[str, Any]]
#: Muon's grid: a call for the matrices, and options of everything else.
GRID: list[Method] = [
    (f"Muon(lr={lr:g}, momentum={momentum:g})", {"lr": rest})
    for lr, momentum, rest in (
        *((0.02, 0.95, 0.02), (0.02, 0.95, 0.05), (0.02, 0.95, 0.1), (0.03, 0.95, 0.05)),
        *((0.02, 0.9, 0.05), (0.03, 0.9, 0.05), (0.05, 0.9, 0.05), (0.02, 0.85, 0.05), (0.04, 0.85, 0.05)),
    )
]
VECTORS = "vectors=Vectors(betas=(0.9, 0.99))"
#: The other methods, at the best of a handful of settings, and the parts of Muon's steps that are tried.
METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "SOAPMuon": ((f"SOAPMuon(lr=0.04, momentum=0.85, {VECTORS})", {"lr": 0.05}), (0.85, 0.9, 0.96)),
    "SOAP-H": (
        (
            "SOAP(lr=0.05, betas=(0.9, 0.95), inverse_update_period=1, norm_control=Hyperball())",
            {"lr": 0.05, "norm_control": None},
        ),
        (0.96,),
    ),
}


@cache
def windows(names: tuple[str, ...]) -> Tensor:
    """Source text of some modules as symbols below 96, in pieces ``(N, CONTEXT + 1)``."""
    text = "".join(inspect.getsource(import_module(name)) for name in names)
    ids = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in text])
    return ids.unfold(0, CONTEXT + 1, CONTEXT)


class Block(nn.Module):
    """Causal attention and a perceptron, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """Pre-norm, causal, with learned positions and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(96, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96, bias=False)
        for table in (self.symbols, self.positions):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.symbols(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    """Cross entropy of the next symbol."""
    return functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: warm-up over a twentieth, then a cosine to zero."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        call: The optimizer.
        rest: Options of embeddings, head and vectors.
        seed: Of initial values and batches.
        steps: Length.
        losses: On held-out text, after every eighth of the run.
        seconds: Of CPU for one step.
    """

    call: str
    rest: dict[str, Any]
    seed: int
    steps: int
    losses: list[float]
    seconds: float

    @property
    def key(self) -> str:
        """What tells it from others."""
        return json.dumps([self.call, self.rest, self.seed, self.steps])


def build(call: str, rest: dict[str, Any], model: nn.Module, pieces: Tensor) -> torch.optim.Optimizer:
    """The optimizer that a call means, with the roles of the parameters as its groups."""
    name, options = read_call(call)
    cls = getattr(precond, name)
    roles = ("embedding", "head", "norm", "bias", "vector")
    options_of = {role: rest for role in roles}
    if cls is precond.Muon:
        options_of["head"] = {**rest, "orthogonalize": False}  # as its author has it
    groups = precond.param_groups(model, cls, (pieces[:, :-1], pieces[:, 1:]), options=options_of)
    return cls(groups, **options)


def run(call: str, rest: dict[str, Any], seed: int, steps: int) -> Run:
    """Train once."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, train, held = Transformer(), windows(TRAIN), windows(HELD_OUT)
        fixed = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(5))[:384]]
        generator = torch.Generator().manual_seed(seed)
        optimizer = build(call, rest, model, fixed[:2])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rate(k, steps))
        losses, seconds = [], 0.0
        for step in range(1, steps + 1):
            begin = time.process_time()
            pieces = train[torch.randint(len(train), (BATCH,), generator=generator)]
            optimizer.zero_grad()
            loss_of(model, pieces).backward()
            optimizer.step()
            scheduler.step()
            seconds += time.process_time() - begin
            if step % (steps // 8) == 0 or step == steps:
                with torch.no_grad():
                    losses.append(float(loss_of(model, fixed)))
        return Run(call, rest, seed, steps, losses, seconds / steps)


class Results:
    """Runs that are kept in a file, a line each."""

    def __init__(self, path: Path) -> None:
        self.path, lines = path, path.read_text().splitlines() if path.exists() else []
        self.known = {found.key: found for found in (Run(**json.loads(line)) for line in lines)}

    def get(self, method: Method, seed: int, steps: int) -> Run:
        """A run, made now or before."""
        key = json.dumps([*method, seed, steps])
        if key not in self.known:
            self.known[key] = found = run(*method, seed, steps)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")
        return self.known[key]

    def runs(self, method: Method, seeds: int, steps: int) -> list[Run]:
        """One for each seed."""
        return [self.get(method, seed, steps) for seed in range(seeds)]


def last(runs: Iterable[Run]) -> list[float]:
    """The losses at their ends."""
    return [found.losses[-1] for found in runs]


def row(name: str, method: Method, runs: list[Run], part: float, target: float) -> str:
    """A line of the table."""
    losses = last(runs)
    spread = stdev(losses) if len(losses) > 1 else math.nan
    told = "yes" if mean(losses) <= target else "no"
    rest = ", ".join(f"{key}={value}" for key, value in method[1].items())
    each = " ".join(f"{loss:.3f}" for loss in losses)
    seconds = 1e3 * mean(found.seconds for found in runs)
    return (
        f"| {name} | `{method[0]}`, the rest `{rest}` | {runs[0].steps} | {part:g} | {mean(losses):.4f} ({spread:.4f}) "
        f"| {told} | {each} | {seconds:.0f} |"
    )


def main() -> None:
    """Print Muon's grid, its runs at the best settings, and the runs of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--parts", nargs="*", type=float, help="of Muon's steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/output/frontier.jsonl"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = Results(given.out)
    print(f"torch {torch.__version__}, one thread, float32, {given.seeds} seeds\n")
    grid = [(results.get(method, 0, STEPS).losses[-1], method) for method in GRID]
    for loss, (call, rest) in grid:
        print(f"`{call}`, the rest `{rest}`: {loss:.4f}", flush=True)
    best = min(grid, key=lambda pair: pair[0])[1]
    muon = results.runs(best, given.seeds, STEPS)
    target = mean(last(muon))
    print("\n| | settings | steps | of Muon's | loss (deviation) | at the target | each seed | ms of CPU a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(row("tuned Muon", best, muon, 1.0, target), flush=True)
    for name in given.only:
        method, parts = METHODS[name]
        for part in given.parts or parts:
            print(row(name, method, results.runs(method, given.seeds, round(part * STEPS)), part, target), flush=True)


if __name__ == "__main__":
    main()
