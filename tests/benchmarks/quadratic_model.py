"""K-FAC without a learning rate beside K-FAC with its best: three autoencoders and two ReLU classifiers.

    python -m tests.benchmarks.quadratic_model [--problems curves,digits] [--seconds 30] [--steps 300] [--seed 0]

All see the same batches for the same seconds of CPU, or for the same steps, from the same start. "Tuned" is the best of
a grid of learning rates with Nesterov's momentum, each run to the end; "defaults" and "adaptive rates" are ``KFAC()``
and ``KFAC(adaptive_rate=AdaptiveRate())``; "quadratic model" is the one recipe of docs/choose.md, with the factors
damped as the model is, or apart from it. Shown is the training loss on all data at the
end, half-way, the steps and the seconds.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from precond import KFAC, AdaptiveRate, LevenbergMarquardt, Momentum, QuadraticModel
from tests.benchmarks.problems import digits

RATES = (0.03, 0.1, 0.3, 1.0)
TUNED = {"momentum": Momentum(0.9, nesterov=True), "curvature_update_period": 5}
RECIPE = {
    "lr": 1.0,
    "damping": 1e-3,
    "curvature_ema": 0.9,
    "curvature_update_period": 5,
    "inverse_update_period": 5,
    "step_size": QuadraticModel(),
    "damping_rule": LevenbergMarquardt(period=5),
}


RECIPES = {
    "defaults": {},
    "adaptive rates": {"adaptive_rate": AdaptiveRate()},
    "quadratic model": RECIPE,
    "quadratic model, factor_period=20": {**RECIPE, "step_size": QuadraticModel(factor_period=20)},
}


@dataclass(frozen=True)
class Problem:
    """A model, its loss, all data and the size of a batch."""

    model: nn.Module
    loss_fn: nn.Module
    x: Tensor
    y: Tensor
    batch: int

    @torch.no_grad()
    def loss(self) -> float:
        return float(self.loss_fn(self.model(self.x), self.y))


def network(sizes: list[int], activation: Callable[[], nn.Module], code: int | None = None) -> nn.Sequential:
    """Linear layers with activations between, but after the code; 15 weights into each unit (Martens 2010), if deep."""
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        if code is not None:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            for row in linear.weight.data:
                chosen = torch.randperm(fan_in)[:15]
                row[chosen] = torch.randn(len(chosen)) if activation is nn.Tanh else 0.4 * torch.randn(len(chosen))
        layers.append(linear)
        if index not in (code, len(sizes) - 2):
            layers.append(activation())
    return nn.Sequential(*layers)


def curve_images(count: int) -> Tensor:
    """Strokes of 16 x 16 pixels along random cubics, ``(count, 256)``."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(count, 4, 2, generator=generator) * 15
    t = torch.linspace(0, 1, 24)
    weights = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)  # Bernstein
    path = torch.einsum("tk,nkc->ntc", weights, points)
    grid = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    images = [torch.exp(-torch.cdist(grid, part).min(2).values.square()) for part in _by_image(path, grid)]
    return torch.cat(images)


def _by_image(path: Tensor, grid: Tensor) -> list[Tensor]:
    return list(path.split(200))


def _autoencoder(sizes: list[int], images: Tensor, activation: Callable[[], nn.Module], batch: int) -> Problem:
    model = network([*sizes, *sizes[-2::-1]], activation, code=len(sizes) - 2)
    return Problem(model, nn.BCEWithLogitsLoss(), images, images, batch)


def curves() -> Problem:
    return _autoencoder([256, 128, 64, 32, 16, 6], curve_images(3000), nn.Tanh, 1000)


def digit_codes() -> Problem:
    return _autoencoder([64, 128, 64, 32, 12, 6], digits()[0], nn.Tanh, 512)


def relu_codes() -> Problem:
    return _autoencoder([64, 96, 48, 12], digits()[0], nn.ReLU, 512)


def relu_digits() -> Problem:
    from sklearn.datasets import load_digits

    x, y = torch.tensor(load_digits().data, dtype=torch.float32) / 16, torch.tensor(load_digits().target)
    return Problem(network([64, 128, 128, 10], nn.ReLU), nn.CrossEntropyLoss(), x, y, 256)


def relu_teacher() -> Problem:
    """Labels of a wide random network; inputs of very different scales."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 30, generator=generator)
    teacher = torch.randn(30, 60, generator=generator), torch.randn(60, 5, generator=generator)
    y = (torch.relu(x @ teacher[0] / 5) @ teacher[1]).argmax(1)
    return Problem(network([30, 100, 100, 100, 5], nn.ReLU), nn.CrossEntropyLoss(), 3 * x, y, 500)


PROBLEMS = {
    "curves": curves,
    "digits": digit_codes,
    "relu codes": relu_codes,
    "relu digits": relu_digits,
    "relu teacher": relu_teacher,
}


@dataclass(frozen=True)
class Run:
    """Losses half-way and at the end, steps and seconds of CPU."""

    half: float
    end: float
    steps: int
    seconds: float

    def row(self, name: str, method: str) -> str:
        return f"| {name} | {method} | {self.half:.4f} | {self.end:.4f} | {self.steps} | {self.seconds:.1f} |"


def run(name: str, options: dict[str, Any], seconds: float, steps: float, seed: int) -> Run:
    """One method, until the seconds or the steps are over."""
    torch.manual_seed(seed)
    problem = PROBLEMS[name]()
    optimizer = KFAC(problem.model, problem.loss_fn, **options)
    generator = torch.Generator().manual_seed(seed)
    spent, taken, half = 0.0, 0, math.nan
    while spent < seconds and taken < steps:
        rows = torch.randint(len(problem.x), (problem.batch,), generator=generator)
        start = time.process_time()
        optimizer.zero_grad()
        problem.loss_fn(problem.model(problem.x[rows]), problem.y[rows]).backward()
        try:
            optimizer.step()
        except FloatingPointError:  # diverged
            return Run(half, math.inf, taken, spent)
        spent += time.process_time() - start
        taken += 1
        if math.isnan(half) and (spent > seconds / 2 or taken >= steps / 2):
            half = problem.loss()
    return Run(half, problem.loss(), taken, spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--seconds", type=float, default=30.0, help="of CPU for each run")
    parser.add_argument("--steps", type=float, default=math.inf, help="of each run, at most")
    parser.add_argument("--rates", default=",".join(str(lr) for lr in RATES), help="the grid of the tuned one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limits = options.seconds, options.steps, options.seed
    print("| problem | method | half-way | at the end | steps | seconds |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for name in options.problems.split(","):
        tuned = {lr: run(name, {"lr": lr, **TUNED}, *limits) for lr in map(float, options.rates.split(","))}
        lr, best = min(tuned.items(), key=lambda pair: pair[1].end)
        print(best.row(name, f"tuned, lr={lr:g}"), flush=True)
        for method, recipe in RECIPES.items():
            print(run(name, recipe, *limits).row(name, method), flush=True)


if __name__ == "__main__":
    main()
