"""What ``shards="local"`` costs in steps: ``python -m tests.benchmarks.local_shards``, about four minutes.

Prints the table of ``docs/how-to/sharded.md``: the training loss after 300 steps of a perceptron on scikit-learn's
digits, by the number of processes among which each matrix is cut. One process has the blocks, which takes the steps of
as many processes (``tests/precond/distributed/test_local_shards.py``). The rate is the best of four, for each number by
itself; the mean of three seeds, with the standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import precond
from tests.precond.distributed.local_runs import InBlocks

CUTS = (1, 2, 4, 16)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
METHODS: dict[str, Callable[..., Any]] = {
    "SOAP": precond.SOAP,
    "Shampoo": precond.Shampoo,
    "Muon": precond.Muon,
    "PSGD": precond.PSGD,
    "torch.optim.AdamW": torch.optim.AdamW,
}


def loss_of(method: str, lr: float, cuts: int, seed: int) -> float:
    """The loss on all of the data after 300 steps of 128 examples."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, loss_fn, steps = InBlocks(net, cuts), nn.CrossEntropyLoss(), 300
    optimizer = METHODS[method](model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss_fn(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss_fn(model(x), y))


def best(method: str, cuts: int) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, at the best rate."""
    runs = torch.tensor([[loss_of(method, lr, cuts, seed) for seed in SEEDS] for lr in RATES])
    row = runs[runs.mean(1).argmin()]
    return float(row.mean()), float(row.std())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| method | " + " | ".join(str(n) for n in CUTS) + " |")
    print("| --- |" + " --- |" * len(CUTS))
    for method in METHODS:
        cells = [best(method, n) for n in (CUTS if method != "torch.optim.AdamW" else CUTS[:1])]
        print(f"| `{method}` | " + " | ".join(f"{m:.2g} ± {s:.1g}" for m, s in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
