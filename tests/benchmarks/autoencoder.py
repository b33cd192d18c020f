"""Error of an autoencoder of digits over time: the methods of the library beside those of torch.

    python -m tests.benchmarks.autoencoder [--budget 3600] [--only "KFAC;SOAP"] [--seed 0] [--average 0.98]

The network, data and error are those of ``problems.autoencoder``: 64-128-64-32-12-6 and back, batches of 512, cross
entropy of pixels as the loss, the squared error of an image as the error.

Time is CPU time, evaluation excluded, in units of one training step of AdamW on this problem, measured on this machine
beside each run: 3600 of these were 10 s where the goals were set. Every setting of a method's grid is run to the end,
with the learning rate falling to zero like a cosine; shown is the setting with the smallest error at the end, the time
until the error is 0.5, the errors on the training images and on those held out. ``--average`` reports the average of
the iterates instead.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from precond import IterateAverage, LevenbergMarquardt, QuadraticModel, TrustRegion
from tests.benchmarks.pinn import MuonAndAdamW
from tests.benchmarks.problems import Problem, autoencoder, digits, squared_error
from tests.benchmarks.training import build

GOAL = 0.5

# Statistics and inverses every five steps; the model itself sets learning rate, momentum and damping.
MODEL = {
    "lr": 1.0,
    "curvature_ema": 0.9,
    "curvature_update_period": 5,
    "inverse_update_period": 5,
    "step_size": QuadraticModel(fraction=0.25),
    "damping_rule": LevenbergMarquardt(period=5),
}
LAYERS = {"momentum": 0.9, "curvature_update_period": 5}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "KFAC, quadratic model": [{"damping": damping, **MODEL} for damping in (1e-3, 1e-2)],
    "EKFAC, quadratic model": [{"damping": damping, **MODEL} for damping in (1e-3, 1e-2)],
    "KFAC": [
        {"lr": lr, "damping": 1e-3, "kl_clip": TrustRegion(clip, of="direction"), **LAYERS}
        for lr, clip in ((0.1, 1e-3), (0.3, 1e-3))
    ],
    "EKFAC": [
        {"lr": lr, "damping": 3e-3, "kl_clip": TrustRegion(clip, of="direction"), **LAYERS}
        for lr, clip in ((0.1, 1e-3), (0.3, 1e-3))
    ],
    "SOAP": [{"lr": lr} for lr in (3e-3, 1e-2, 2e-2)],
    "KLShampoo": [{"lr": lr} for lr in (3e-3, 1e-2)],
    "Shampoo": [{"lr": lr} for lr in (3e-3, 1e-2)],
    "Muon": [{"lr": lr} for lr in (3e-3, 1e-2, 2e-2)],
    "PSGD": [{"lr": lr} for lr in (3e-3, 1e-2)],
    "AdamW": [{"lr": lr} for lr in (3e-3, 1e-2)],
    "torch Muon": [{"lr": lr} for lr in (3e-3, 1e-2, 2e-2)],
    "torch LBFGS, full batch": [{}],
}


@dataclass(frozen=True)
class Course:
    """What a run came to.

    Attributes:
        settings: Of the method.
        reached: Time until the error was :data:`GOAL`, in steps of AdamW.
        error: At the end.
        held_out: At the end, of images that were held out.
        steps: In all.
    """

    settings: dict[str, Any]
    reached: float
    error: float
    held_out: float
    steps: int


def make(problem: Problem, name: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The optimizer, and one training step of it."""
    if name == "torch Muon":
        optimizer = MuonAndAdamW(problem.model, **settings)
    elif name.startswith("torch LBFGS"):
        optimizer = torch.optim.LBFGS(problem.model.parameters(), history_size=50, line_search_fn="strong_wolfe")
    else:
        return build(problem, name.split(",")[0], settings)

    def step() -> None:
        x, y = (problem.inputs, problem.targets) if name.startswith("torch LBFGS") else problem.batch()

        def closure() -> torch.Tensor:
            problem.model.zero_grad()
            loss = problem.loss_fn(problem.model(x), y)
            loss.backward()
            return loss

        if name == "torch Muon":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)

    return optimizer, step


def clock() -> Callable[[], float]:
    """Measures the seconds of CPU that a step of AdamW takes."""
    _, step = build(autoencoder(0, logits=True), "AdamW", {"lr": 1e-3})
    step()

    def seconds(steps: int = 4) -> float:
        start = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - start) / steps

    return seconds


def run(name: str, settings: dict[str, Any], budget: float, seed: int, decay: float) -> Course:
    """Train for the time of some steps of AdamW."""
    problem, (_, held_out) = autoencoder(seed, logits=True), digits()
    optimizer, step = make(problem, name, settings)
    average = IterateAverage(optimizer, decay) if decay and isinstance(optimizer, torch.optim.Optimizer) else None
    rates = [group["lr"] for group in optimizer.param_groups]
    seconds = clock()
    spent, steps, reached = 0.0, 0, math.inf
    for share in range(1, 101):  # the machine may be busier at one time than at another
        rate_of_time = 1 / seconds()
        while spent < budget * share / 100:
            start = time.process_time()
            step()
            steps += 1
            if not name.startswith("torch LBFGS"):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * max(0.5 * (1 + math.cos(math.pi * min(spent / budget, 1.0))), 1e-3)
            spent += rate_of_time * (time.process_time() - start)
        if reached == math.inf:
            with average.applied() if average else nullcontext():
                reached = spent if problem.measure() <= GOAL else math.inf
    with average.applied() if average else nullcontext():
        return Course(settings, reached, problem.measure(), squared_error(problem.model, held_out, True), steps)


def words(settings: dict[str, Any]) -> str:
    """Settings that differ within a grid."""
    return ", ".join(
        f"{key}={value:g}" for key, value in settings.items() if isinstance(value, float) and key != "curvature_ema"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=3600.0, help="of each run, in steps of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=";".join(GRIDS), help="methods, separated by semicolons")
    parser.add_argument("--average", type=float, default=0.0, help="decay of the average of the iterates")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    print(f"\n### autoencoder, seed {options.seed}, the time of {options.budget:g} steps of AdamW\n")
    print(f"| method | best setting | time to {GOAL} | error at the end | held out | steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.only.split(";"):
        courses = []
        for settings in GRIDS[name]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # says that a step was skipped
                courses.append(run(name, settings, options.budget, options.seed, options.average))
        best = min(courses, key=lambda course: course.error)
        shown = words(best.settings)
        reached = f"{best.reached:.0f}" if best.reached < math.inf else "not"
        print(f"| {name} | {shown} | {reached} | {best.error:.3f} | {best.held_out:.2f} | {best.steps} |", flush=True)


if __name__ == "__main__":
    main()
