"""Ten thousand small fits in one call, beside a loop over SciPy.

    python -m tests.benchmarks.fits [--problems 10000] [--points 40]

Each fit has three unknowns (height, rate and floor of a decay) and its own data with noise. SciPy gets the exact
Jacobian as a function, and the same start. Shown are seconds of CPU, fits that came to the same minimum (costs within a
millionth), and how many ended higher.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import scipy.optimize
import torch

from precond import least_squares


def data(problems: int, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Times ``(points,)`` and measured decays ``(problems, points)``."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(problems, 1, generator=generator, dtype=torch.float64)

    t = torch.linspace(0, 4, points, dtype=torch.float64)
    y = uniform(1, 4) * torch.exp(-uniform(0.3, 3) * t) + uniform(-0.5, 0.5)
    return t, y + 0.02 * torch.randn(problems, points, generator=generator, dtype=torch.float64)


def ours(t: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Costs ``(problems,)``."""
    start = torch.ones(len(y), 3, dtype=torch.float64)
    found = least_squares(
        lambda x: x[:, :1] * torch.exp(-x[:, 1:2] * t) + x[:, 2:] - y, start, batched=True, acceleration=False
    )
    return found.cost.numpy()


def scipys(t: torch.Tensor, y: torch.Tensor, method: Any) -> np.ndarray:
    """Costs ``(problems,)``, one after another."""
    times, costs = t.numpy(), []
    for row in y.numpy():

        def residuals(x: np.ndarray, row: np.ndarray = row) -> np.ndarray:
            return x[0] * np.exp(-x[1] * times) + x[2] - row

        def jacobian(x: np.ndarray) -> np.ndarray:
            decay = np.exp(-x[1] * times)
            return np.stack([decay, -x[0] * times * decay, np.ones_like(times)], 1)

        costs.append(scipy.optimize.least_squares(residuals, np.ones(3), jac=jacobian, method=method).cost)
    return np.array(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    t, y = data(options.problems, options.points)
    ours(t, y[:10])  # loads what the first call loads
    costs, seconds = {}, {}
    for name, run in {
        "precond.least_squares(batched=True)": ours,
        'scipy.optimize.least_squares(method="lm"), a loop': lambda t, y: scipys(t, y, "lm"),
        'scipy.optimize.least_squares(method="trf"), a loop': lambda t, y: scipys(t, y, "trf"),
    }.items():
        start = time.process_time()
        costs[name] = run(t, y)
        seconds[name] = time.process_time() - start
    best = np.min(list(costs.values()), axis=0)
    print(f"\n### {options.problems:,} fits of three unknowns to {options.points} points\n")
    print("| | seconds of CPU | fits a second | at the lowest cost of the three | above it |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, cost in costs.items():
        right = int((cost <= best * (1 + 1e-6)).sum())
        print(
            f"| {name} | {seconds[name]:.2f} | {len(y) / seconds[name]:,.0f} | {right:,} | {len(y) - right:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
