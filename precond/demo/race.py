"""Training one model with one optimizer, with the clock running for its steps only.

The clock is that of the process: with one thread it equals a wall clock on an idle machine.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from precond.demo.contenders import Contender, Settings
from precond.demo.tasks import Data, Task
from solvers import SolverError


@dataclass
class Run:
    """The outcome of one training.

    Attributes:
        task: The task.
        contender: Name of the optimizer.
        settings: Its settings.
        steps: Steps at which the loss was evaluated.
        seconds: CPU seconds spent in the training loop up to each of them; evaluations do not count.
        losses: Loss on all training data at each of them.
        held_out: Held-out score at the end.
    """

    task: Task
    contender: str
    settings: Settings
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out: float = math.nan

    @property
    def reached(self) -> int | None:
        """Index of the first evaluation at or below the task's target, if there is one."""
        return next((i for i, loss in enumerate(self.losses) if loss <= self.task.target), None)

    def summary(self) -> str:
        """The outcome in words."""
        if self.reached is not None:
            return f"reaches {self.task.target:g} in {self.steps[self.reached]} steps"
        return "diverges" if self.diverged else f"is at {self.losses[-1]:.3g} after {self.steps[-1]} steps"

    @property
    def diverged(self) -> bool:
        """Whether the loss is NaN, or far above its start."""
        return not self.losses[-1] < 10 * self.losses[0]


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end; every example once per pass, an incomplete last batch left out."""
    while True:
        order = torch.randperm(len(data.x), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size]
            yield data.x[index], data.y[index]


def train(
    task: Task, contender: Contender, settings: Settings, *, seed: int, steps: int, until_target: bool = False
) -> Run:
    """Train a model from scratch; model and batches depend on the seed alone, not on the optimizer.

    The learning rate falls linearly, to zero after the task's number of steps.

    Args:
        task: The task.
        contender: With which optimizer.
        settings: Settings of the optimizer.
        seed: Seed of the initialisation and of the batches.
        steps: Steps at most; a run that diverges ends early.
        until_target: End when the target is reached.
    """
    run = Run(task, contender.name, settings)
    data = task.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.make_model()
    optimizer = contender.make(model, task.loss_fn, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / task.steps))
    stream = batches(data, min(task.batch_size, len(data.x)), torch.Generator().manual_seed(seed))

    def evaluate(step: int, seconds: float) -> bool:
        with torch.no_grad():
            run.losses.append(float(task.loss_fn(model(data.x), data.y)))
        run.steps.append(step)
        run.seconds.append(seconds)
        return run.diverged or (until_target and run.reached is not None)

    seconds = 0.0
    evaluate(0, 0.0)
    with tqdm(total=steps, desc=f"{task.name}, {contender.name}", leave=False, disable=None) as bar:
        for step in range(1, steps + 1):
            start = time.process_time()
            x, y = next(stream)
            try:
                optimizer.zero_grad()
                loss = task.loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
            except (FloatingPointError, SolverError):  # a preconditioner refuses numbers that are not finite
                run.steps.append(step)
                run.seconds.append(seconds)
                run.losses.append(math.inf)
                break
            seconds += time.process_time() - start
            bar.update()
            if step % task.evaluation_period == 0 or step == steps:
                if evaluate(step, seconds):
                    break
                bar.set_postfix(loss=f"{run.losses[-1]:.4f}")
    with torch.no_grad():
        run.held_out = task.score(model(data.held_out_x), data.held_out_y)
    return run


def warm_up(task: Task, contender: Contender, settings: Settings) -> None:
    """A few steps that are not measured: the first ones of a process load libraries and start threads."""
    train(task, contender, settings, seed=0, steps=3)


@dataclass
class Trial:
    """One point of a grid, tried at several seeds.

    Attributes:
        settings: The point.
        runs: One run per seed; fewer if it could not win any more.
    """

    settings: Settings
    runs: list[Run]

    @property
    def steps(self) -> float:
        """Steps to the target, summed over the seeds; infinite if one missed it."""
        return sum(math.inf if run.reached is None else run.steps[run.reached] for run in self.runs)

    @property
    def rank(self) -> tuple[float, float]:
        """The key of a comparison: the steps, then the learning rate; where a target was missed, the loss."""
        if math.isfinite(self.steps):
            return self.steps, self.settings["lr"]
        return math.inf, max(math.inf if run.diverged else run.losses[-1] for run in self.runs)


def tune(task: Task, contender: Contender, *, seeds: Sequence[int], steps: int) -> list[Trial]:
    """Every point of the contender's grid, the best first: fewest steps to the target, ties to the smaller ``lr``.

    A point that has used more steps than the best so far cannot win and is ended.

    Args:
        task: The task.
        contender: With which optimizer.
        seeds: Seeds of initialisation and batches.
        steps: Steps at most, for each seed.
    """
    trials: list[Trial] = []
    best = math.inf
    for settings in tqdm(contender.grid(), desc=f"tuning {contender.name} on {task.name}", leave=False, disable=None):
        trial = Trial(settings, [])
        for seed in seeds:
            limit = min(steps, best - trial.steps)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # grids are meant to find divergence
                trial.runs.append(train(task, contender, settings, seed=seed, steps=int(limit), until_target=True))
            if trial.runs[-1].reached is None:
                break
        trials.append(trial)
        best = min(best, trial.steps)
    return sorted(trials, key=lambda trial: trial.rank)
