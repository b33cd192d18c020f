"""Who wins out of the box? One configuration of each method on many problems, against AdamW at its best of twelve.

    python -m tests.benchmarks.defaults [--methods SOAP "Muon(lr=0.03)"] [--problems words] [--seeds 3] [--half tune]

A method is a call as in a script, without parameters, model and loss: ``SOAP``, ``KFAC(lr=0.1)``. All have the same
problems, batches, steps and schedule (warm-up of a twentieth, then a cosine to zero). The target of a problem and a
seed is the last loss of the best of AdamW's twelve runs. Counted are the share of the run until the target is reached,
2 where it is not; the seconds of CPU until then as multiples of that AdamW's whole run; and crashes, and runs that end
above their first loss or at no number. Runs are kept in ``--out``, a line each, and are not made again while the code
that made them is the same (:mod:`tests.benchmarks.fingerprint`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import precond
from solvers import SolverError
from tests.benchmarks.calls import read_call
from tests.benchmarks.fingerprint import fingerprint
from tests.benchmarks.later_problems import LATER
from tests.benchmarks.small_problems import CONFIRM, PROBLEMS, TUNE, SmallProblem

GRID = [
    f"AdamW(lr={lr:g}, betas=(0.9, {beta:g}))"
    for lr, beta in product((1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2, 1e-1), (0.95, 0.999))
]
METHODS = (
    *("SOAP", "Muon", "KLShampoo", "Shampoo", "PSGD", "SPlus"),
    *("KFAC", "EKFAC", "TNT", "SINGD(lr=0.1)"),
)
EVERY = 5
MISS = 2.0
ALL = PROBLEMS | LATER
PARTS = {None: PROBLEMS, "tune": TUNE, "confirm": CONFIRM, "later": LATER}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: The call.
        problem: Name of the problem.
        seed: Of initial values and batches.
        steps: Length.
        losses: Before the first step, and after every :data:`EVERY` steps.
        seconds: Of CPU for all steps.
        error: Of what was raised, if anything.
        code: Fingerprint of the code that made it.
    """

    method: str
    problem: str
    seed: int
    steps: int
    losses: list[float]
    seconds: float
    error: str = ""
    code: str = ""

    @property
    def failed(self) -> bool:
        """Whether it crashed or diverged."""
        return bool(self.error) or not self.losses[-1] <= self.losses[0]

    def share(self, target: float) -> float:
        """Part of the run until a loss is reached, :data:`MISS` if it is not."""
        if self.error:
            return MISS
        reached = (i for i, loss in enumerate(self.losses) if loss <= target)
        first = next(reached, None)
        return MISS if first is None else min(1.0, max(first, 1) * EVERY / self.steps)


def code_of(method: str) -> str:
    """Fingerprint of what a run of a method depends on; those of torch do not depend on our packages."""
    ours = read_call(method)[0] not in ("AdamW", "TorchMuon")
    return fingerprint("defaults", "small_problems", "problems", packages=ours)


def build(method: str, problem: SmallProblem) -> torch.optim.Optimizer:
    """The optimizer that a call means."""
    name, options = read_call(method)
    params = list(problem.model.parameters())
    if name == "AdamW":
        return torch.optim.AdamW(params, **options)
    if name == "TorchMuon":
        return TorchMuon(params, **options)
    found = next(m for m in precond.methods() if m.name == name)
    if found.needs == "layers":
        return found.cls(problem.model, problem.loss_fn, **problem.layerwise | options)
    return found.cls(params, **options)


class TorchMuon(torch.optim.Optimizer):
    """``torch.optim.Muon`` for matrices, with AdamW for the others."""

    def __init__(self, params: list[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.parts = [
            torch.optim.Muon([p for p in params if p.ndim == 2], lr=lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for p in params if p.ndim != 2], lr=lr, betas=(0.9, 0.95)),
        ]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate at a step, from 0: warm-up over a twentieth, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def run(method: str, name: str, seed: int, steps: int | None = None) -> Run:
    """Train once."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        problem = ALL[name](seed)
        generator = torch.Generator().manual_seed(seed)
        steps = steps or problem.steps
        losses, seconds, error = [problem.measure()], 0.0, ""
        try:
            optimizer = build(method, problem)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rate(k, steps))
            for step in range(1, steps + 1):
                begin = time.process_time()
                x, y = problem.batch(generator)
                optimizer.zero_grad()
                problem.loss(x, y).backward()
                optimizer.step()
                scheduler.step()
                seconds += time.process_time() - begin
                if step % EVERY == 0 or step == steps:
                    losses.append(problem.measure())
        except (RuntimeError, ArithmeticError, SolverError, ValueError, TypeError, NotImplementedError) as failure:
            error = f"{type(failure).__name__}: {failure}"[:300]
        return Run(method, name, seed, steps, losses, seconds, error, code_of(method))


class Results:
    """Runs that are kept in a file, a line each; those of other code stay there and do not count."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                found = Run(**json.loads(line))
                if found.code == code_of(found.method):
                    self.known[found.method, found.problem, found.seed] = found

    def get(self, method: str, problem: str, seed: int) -> Run:
        """A run, made now or before."""
        key = method, problem, seed
        if key not in self.known:
            self.known[key] = found = run(*key)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
        return self.known[key]

    def target(self, problem: str, seed: int) -> Run:
        """The run of AdamW with the lowest last loss."""
        runs = [self.get(method, problem, seed) for method in GRID]
        return min(runs, key=lambda r: r.losses[-1] if math.isfinite(r.losses[-1]) else math.inf)


@dataclass(frozen=True)
class Score:
    """What a method came to on some problems.

    Attributes:
        shares: (problem, seed) -> part of the run until AdamW's last loss.
        costs: (problem, seed) -> seconds of a step over AdamW's.
        failures: Of the runs that crashed or diverged, (problem, seed), what was raised.
    """

    shares: dict[tuple[str, int], float]
    costs: dict[tuple[str, int], float]
    failures: dict[tuple[str, int], str]

    @property
    def reached(self) -> int:
        """Number of targets reached."""
        return sum(share <= 1 for share in self.shares.values())

    @property
    def steps(self) -> float:
        """Geometric mean of the shares."""
        return geometric_mean(self.shares.values())

    @property
    def seconds(self) -> float:
        """Geometric mean of the seconds until the target."""
        return geometric_mean(share * self.costs[key] for key, share in self.shares.items())

    @property
    def cost(self) -> float:
        """Geometric mean of the costs of a step."""
        return geometric_mean(self.costs.values())

    def markdown(self, method: str) -> str:
        """A row of the table."""
        failed = ", ".join(sorted({f"{problem}" for problem, _ in self.failures}))
        counted = f"{len(self.failures)} ({failed})" if self.failures else ""
        return (
            f"| `{method}` | {self.reached} of {len(self.shares)} | {self.steps:.2f} | {self.seconds:.2f} "
            f"| {self.cost:.1f} | {counted} |"
        )


def score(results: Results, method: str, problems: Iterable[str], seeds: int) -> Score:
    """Runs of a method against the targets."""
    shares, costs, failures = {}, {}, {}
    for key in product(problems, range(seeds)):
        best, found = results.target(*key), results.get(method, *key)
        shares[key] = found.share(best.losses[-1])
        done = max(1, EVERY * (len(found.losses) - 1))  # steps, where it crashed
        costs[key] = max(found.seconds / done, 1e-9) / (best.seconds / best.steps)
        if found.failed:
            failures[key] = found.error or f"{found.losses[0]:.3g} to {found.losses[-1]:.3g}"
    return Score(shares, costs, failures)


def main() -> None:
    """Print a table: a row for each method; with ``--each`` the shares of every problem as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--problems", nargs="*", choices=tuple(ALL))
    parser.add_argument("--half", choices=("tune", "confirm", "later"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", action="store_true", help="also every problem")
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/output/defaults.jsonl"))
    given = parser.parse_args()
    problems = given.problems or list(PARTS[given.half])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = Results(given.out)
    print(f"torch {torch.__version__}, one thread, float32; {given.seeds} seeds of {', '.join(problems)}\n")
    print("| one configuration for all | reached | steps | CPU time | a step | crashed or diverged |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for method in given.methods:
        found = score(results, method, problems, given.seeds)
        print(found.markdown(method), flush=True)
        if given.each:
            for problem in problems:
                shares = " ".join(f"{found.shares[problem, s]:4.2f}" for s in range(given.seeds))
                cost = geometric_mean(found.costs[problem, s] for s in range(given.seeds))
                ends = " ".join(f"{results.get(method, problem, s).losses[-1]:.3g}" for s in range(given.seeds))
                goals = " ".join(f"{results.target(problem, s).losses[-1]:.3g}" for s in range(given.seeds))
                wrong = {text for (name, _), text in found.failures.items() if name == problem}
                print(f"    {problem:14} {shares}  x{cost:4.1f}  {ends} / {goals}  {'; '.join(sorted(wrong))[:150]}")


if __name__ == "__main__":
    main()
