"""Steps to a target loss: every method of the library, from one setting each, beside SGD with its best rate.

    python -m tests.benchmarks.training [--problems autoencoder] [--only KFAC,SOAP] [--seeds 3]

Prints Markdown. Each method has one setting (``SETTINGS``), the same on both problems; SGD, with and without momentum,
and AdamW take the best learning rate of ``RATES`` on each problem. The target is looked at every few
steps; a run ends there, where the measure is not finite, or where it is behind SGD (``LIMIT`` steps for SGD itself).
Medians over the seeds; batches and initial values are functions of the seed, so runs repeat.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import precond
from precond import IterateAverage, Momentum, TrustRegion
from precond.step.renamed import spelled
from solvers import CG
from tests.benchmarks.problems import PROBLEMS, Problem

NESTEROV = Momentum(0.9, nesterov=True)
# One setting for each method, on all problems; everything else is the library's default. ``average`` is the decay of an
# average of the iterates, which is then what is measured.
SETTINGS: dict[str, dict[str, Any]] = {
    "AdaHessian": {"lr": 0.1, "eps": 1e-8},
    "CurveBall": {"damping": 0.1},
    "EKFAC": {"lr": 0.1, "damping": 3e-2, "momentum": NESTEROV},
    "GaLore": {"lr": 7e-3, "rank": 24, "scale": 1.0},
    "GaussNewton": {"solver": CG(rtol=0.1, progress=False), "damping": 1e-2},
    "HessianFree": {"max_steps": 30},
    "KBFGS": {"lr": 0.3, "kl_clip": 1e-2, "momentum": NESTEROV, "average": 0.9},
    "KFAC": {"lr": 0.1, "damping": 1e-2, "momentum": NESTEROV},
    "KLShampoo": {"lr": 1e-2},
    "MFAC": {"lr": 1.5e-3, "damping": 1e-3, "window": 64, "momentum": NESTEROV},
    "Muon": {"lr": 1e-2},
    "NaturalGradient": {"lr": 0.3, "structure": "unit", "damping": 1e-2, "momentum": NESTEROV},
    "PSGD": {"lr": 1e-2},
    "SENG": {"lr": 1.0, "damping": 0.3, "kl_clip": 2e-3, "momentum": NESTEROV},
    "SINGD": {"lr": 0.1, "damping": 3e-2, "momentum": NESTEROV},
    "SMWNaturalGradient": {"lr": 1.0, "fisher": "mc", "average": 0.95},
    "SOAP": {"lr": 1e-2},
    "SOAPMuon": {"lr": 1e-2},
    "SPlus": {"lr": 0.2, "average": 0.95},
    "Shampoo": {"lr": 1e-2},
    "Sophia": {"lr": 3e-3, "gamma": 1.0, "betas": (0.9, 0.99), "average": 0.95},
    "TNT": {"lr": 0.1, "damping": 1e-2, "momentum": NESTEROV},
}
# Where a method does not apply. Newton and the dense GaussNewton have problems of their own, convex.py and pinn.py.
ABSENT = {
    "Newton": {"autoencoder": "a dense Hessian of 36 000 parameters", "language model": "of 33 000"},
    "GaussNewton": {"language model": "no least squares"},
    "SSBFGS": {"autoencoder": "needs the same batch in every step", "language model": "needs the same batch"},
    "SSBroyden": {"autoencoder": "a dense matrix of 36 000 parameters", "language model": "of 33 000"},
}

RATES = {
    "SGD": (1.0, 0.3, 3.0, 0.1),
    "SGD, momentum 0.9": (0.3, 0.1, 1.0, 0.03),
    "AdamW": (3e-3, 1e-2, 1e-3, 3e-2),
}
TARGET = {"autoencoder": 1.5, "language model": 1.8}
LIMIT = {"autoencoder": 3000, "language model": 1500}
EVERY = 5

Step = Callable[[], Any]


@dataclass(frozen=True)
class Run:
    """What one run came to.

    Attributes:
        steps: To the target; infinite if it was not reached.
        best: The smallest measure seen.
        seconds: Of CPU for one step.
    """

    steps: float
    best: float
    seconds: float


def build(problem: Problem, name: str, settings: dict[str, Any]) -> tuple[torch.optim.Optimizer, Step]:
    """The optimizer of a method, and one training step of it on the next batch."""
    model, loss_fn, params = problem.model, problem.loss_fn, list(problem.model.parameters())
    if name.startswith("SGD"):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(params, momentum=0.9 if "0.9" in name else 0.0, **settings)
        needs = "grad"
    elif name == "AdamW":
        optimizer, needs = torch.optim.AdamW(params, weight_decay=0.0, **settings), "grad"
    else:
        method = next(m for m in precond.methods() if m.name == name)
        needs = method.needs
        clip = settings.get("kl_clip", 1e-3)
        # The settings were found with this bound; a step size from the quadratic model has one of its own.
        if needs == "layers" and "step_size" not in settings and not isinstance(clip, TrustRegion):
            settings = {**settings, "kl_clip": TrustRegion(clip, of="direction")}
        takes_loss = needs == "layers" or name in ("CurveBall", "HessianFree")
        optimizer = method.cls(model, loss_fn, **settings) if takes_loss else method.cls(params, **settings)

    def step() -> None:
        x, y = problem.batch()
        if name == "GaussNewton":
            optimizer.step(lambda: (model(x) - y) * (2 / y.numel()) ** 0.5)
            return

        def closure() -> torch.Tensor:
            return loss_fn(model(x), y.flatten() if y.dtype == torch.long else y)

        if needs == "closure":
            optimizer.step(closure)
            return
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()

    return optimizer, step


def run(
    problem: Problem, step: Step, target: float, limit: int, every: int = EVERY, average: IterateAverage | None = None
) -> Run:
    """Steps until the measure is at the target, of the average of the iterates if there is one."""
    start, best = time.process_time(), math.inf
    for count in range(1, limit + 1):
        step()
        if count % every == 0 or count == limit:
            with average.applied() if average else nullcontext():
                value = problem.measure()
            best = min(best, value)
            if value <= target or not math.isfinite(value):
                break
    steps = count if best <= target else math.inf
    return Run(steps, best, (time.process_time() - start) / count)


def trial(problem: str, name: str, settings: dict[str, Any], seed: int, limit: int | None = None) -> Run:
    """One run of a method from the beginning; one that diverges never reaches the target."""
    made = PROBLEMS[problem](seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # says that a step was skipped
        try:
            own = {key: value for key, value in settings.items() if key != "average"}
            optimizer, step = build(made, name, own)
            average = IterateAverage(optimizer, settings["average"]) if "average" in settings else None
            return run(made, step, TARGET[problem], limit or LIMIT[problem], average=average)
        except FloatingPointError:  # many skipped steps in a row
            return Run(math.inf, math.inf, math.nan)


@dataclass(frozen=True)
class Row:
    """The runs of one method on one problem.

    Attributes:
        name: Of the method.
        settings: Its options.
        runs: One for each seed.
    """

    name: str
    settings: dict[str, Any]
    runs: list[Run]

    @property
    def steps(self) -> float:
        """Median over the seeds."""
        return median(run.steps for run in self.runs)

    def markdown(self, reference: float) -> str:
        """A line of the table; ``reference`` is SGD's number of steps."""
        options = ", ".join(f"{key}={_shown(value)}" for key, value in self.settings.items()) or "defaults"
        each = " ".join(f"{run.steps:.0f}" if run.steps < math.inf else "-" for run in self.runs)
        steps = f"{self.steps:.0f}" if self.steps < math.inf else f"not (best {median(r.best for r in self.runs):.3g})"
        ratio = f"{reference / self.steps:.1f}" if max(self.steps, reference) < math.inf else "-"
        milliseconds = 1e3 * median(run.seconds for run in self.runs)
        return f"| `{self.name}` | {options} | {steps} | {each} | {ratio} | {milliseconds:.1f} |"


def _shown(value: Any) -> str:
    return f"CG(rtol={value.rtol:g})" if isinstance(value, CG) else spelled(value)


def best_rate(problem: str, name: str, seeds: int) -> Row:
    """The runs of a torch optimizer at the learning rate with the fewest steps, in the median over the seeds."""
    best: Row | None = None
    for lr in RATES[name]:
        limit = LIMIT[problem] if best is None else int(min(best.steps, LIMIT[problem]))
        found = Row(name, {"lr": lr}, [trial(problem, name, {"lr": lr}, seed, limit) for seed in range(seeds)])
        if best is None or found.steps < best.steps:
            best = found
    assert best is not None
    return best


def table(problem: str, names: list[str], seeds: int) -> None:
    """Print the table of one problem, line by line as it is found."""
    print(f"\n### {problem}: steps to {TARGET[problem]}\n")
    print(
        "| method | options | steps | each seed | SGD's steps / these | ms of CPU a step |\n|---|---|---|---|---|---|"
    )
    reference, limit = math.inf, LIMIT[problem]
    for name in [*RATES, *names]:
        if problem in ABSENT.get(name, {}):
            continue
        if name in RATES:
            row = best_rate(problem, name, seeds)
        else:
            settings = SETTINGS[name]
            row = Row(name, settings, [trial(problem, name, settings, seed, limit) for seed in range(seeds)])
        if name == "SGD":
            reference = row.steps
            limit = int(min(limit, 0.6 * reference))  # more than half is not what is asked for
        print(row.markdown(reference), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--only", default=",".join(SETTINGS), help="methods of the library, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, {options.seeds} seeds, medians")
    for problem in options.problems.split(","):
        table(problem, [name for name in options.only.split(",") if name], options.seeds)


if __name__ == "__main__":
    main()
