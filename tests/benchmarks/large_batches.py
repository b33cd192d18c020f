"""How many steps to a loss, against the size of the batch? A small transformer on source text.

    python -m tests.benchmarks.large_batches [--methods SOAP KFAC] [--batches 32 1024] [--target 2.6]

All have the same windows of text, the same batches and a warm-up of five steps to a constant rate. AdamW is at the best
of its rates for each batch; the others at their defaults, the layerwise Gauss-Newton matrix at those of K-FAC. One
seed. Whole blocks have up to 1,536 unknowns; with sampled labels an estimate has the rank of a few batches.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from tests.benchmarks.defaults import build
from tests.benchmarks.problems import FlatOutput, Transformer
from tests.benchmarks.small_problems import SmallProblem, windows

_KFAC = "lr=0.2, damping=LossDamping(1e-2), momentum=Momentum(0.9, nesterov=True)"
#: Label -> calls, of which the best counts.
METHODS = {
    "AdamW, best of four rates": [f"AdamW(lr={lr:g}, betas=(0.9, 0.95))" for lr in (0.006, 0.015, 0.04, 0.1)],
    "SOAP": ["SOAP"],
    "KFAC": ["KFAC"],
    "EKFAC": ["EKFAC"],
    "layerwise Gauss-Newton": [f"NaturalGradient({_KFAC}, structures={{'model.symbols': AdamStep()}})"],
}
BATCHES = (32, 128, 512, 1024)


@dataclass(frozen=True)
class Outcome:
    """Steps and seconds of CPU to the target; the loss at the end where it was not reached."""

    steps: int | None
    seconds: float
    loss: float


def run(method: str, batch: int, target: float, limit: int, seed: int = 0, size: int = 1024) -> Outcome:
    """Train until the loss is at the target."""
    x, y = (each[:size] for each in windows(16))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FlatOutput(Transformer(width=16, depth=1, heads=2))
        problem = SmallProblem(model, nn.CrossEntropyLoss(), x, y, batch)
        optimizer, generator = build(method, problem), torch.Generator().manual_seed(seed)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 5))
        begin, loss = time.process_time(), problem.measure()
        for step in range(1, limit + 1):
            inputs, targets = problem.batch(generator)
            optimizer.zero_grad()
            problem.loss(inputs, targets).backward()
            optimizer.step()
            scheduler.step()
            loss = problem.measure()
            if loss <= target:
                return Outcome(step, time.process_time() - begin, loss)
        return Outcome(None, time.process_time() - begin, loss)


def main() -> None:
    """Print a table, a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--target", type=float, default=2.6)
    parser.add_argument("--limit", type=int, default=150)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"Steps (seconds of CPU) to a loss of {given.target}; a loss: not within {given.limit} steps.\n")
    print("| windows in a batch | " + " | ".join(map(str, given.batches)) + " |")
    print("| --- " * (len(given.batches) + 1) + "|", flush=True)
    for label in given.methods:
        cells = []
        for batch in given.batches:
            limit, best = given.limit, None
            for method in METHODS[label]:
                found = run(method, batch, given.target, limit)
                if best is None or (found.steps or 10**9, found.loss) < (best.steps or 10**9, best.loss):
                    best = found
                limit = best.steps or limit  # a slower one need not end
            assert best is not None
            cells.append(f"{best.steps} ({best.seconds:.1f})" if best.steps else f"- ({best.loss:.2f})")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
