"""Do the defaults of the layer-based optimizers diverge anywhere? ``python -m tests.benchmarks.robustness``.

Six small problems, three seeds, learning rates over three decades; everything but ``lr`` at its default. Counts runs
that end above their first loss or at no number, and prints the loss at the end over that at the start.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import precond
from solvers import SolverError

METHODS = ("KFAC", "EKFAC", "TNT", "KBFGS", "SENG", "NaturalGradient", "SINGD", "SMWNaturalGradient")
RATES = (1e-3, 1e-2, 1e-1, 1.0)
SEEDS = (0, 1, 2)

#: Seed -> model, loss module, training set.
Problem = Callable[[int], tuple[nn.Module, nn.Module, Tensor, Tensor]]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images ``(N, 64)`` in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def autoencoder(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Deep autoencoder of digits, sigmoid cross-entropy."""
    sizes = (64, 48, 24, 8, 24, 48, 64)
    layers = [part for m, n in pairwise(sizes) for part in (nn.Linear(m, n), nn.Tanh())]
    x, _ = digits()
    return nn.Sequential(*layers[:-1]), nn.BCEWithLogitsLoss(), x, x


def classifier(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Perceptron on digits."""
    x, y = digits()
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), nn.CrossEntropyLoss(), x, y


def regression(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Noisy smooth function of eight inputs."""
    x = torch.randn(1024, 8)
    y = (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3].square() / 4 + 0.1 * torch.randn(1024, 1)
    return (
        nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)),
        nn.MSELoss(),
        x,
        y,
    )


def convolutional(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Small convolutional network with batch norm on digits."""
    x, y = digits()
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )
    return model, nn.CrossEntropyLoss(), x.reshape(-1, 1, 8, 8), y


class Language(nn.Module):
    """One block of attention over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 24), nn.Parameter(0.02 * torch.randn(12, 24))
        self.block = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, V, S)`` of the next token."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.block(self.tokens(x) + self.places, mask, is_causal=True)).mT


def gpt(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Tokens that follow from the two before them, mostly."""
    x = torch.randint(0, 16, (512, 13))
    for t in range(2, 13):
        rule = (3 * x[:, t - 1] + x[:, t - 2]) % 16
        x[:, t] = torch.where(torch.rand(512) < 0.9, rule, x[:, t])
    return Language(), nn.CrossEntropyLoss(), x[:, :-1], x[:, 1:]


def scaled(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Regression on inputs whose scales span four decades, targets of size 30."""
    x = torch.randn(1024, 12) * torch.logspace(-2, 2, 12)
    y = 30 * (x @ (torch.randn(12, 1) / torch.logspace(-2, 2, 12).unsqueeze(1))).tanh()
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 1)), nn.MSELoss(), x, y


PROBLEMS: dict[str, Problem] = {
    f.__name__: f for f in (autoencoder, classifier, regression, convolutional, gpt, scaled)
}


def run(method: str, problem: str, lr: float, seed: int, steps: int, batch: int, **options: Any) -> dict[str, Any]:
    """One training run: the loss on 512 examples at the end over that at the start, and seconds of the processor."""
    torch.manual_seed(seed)
    model, loss_fn, x, y = PROBLEMS[problem](seed)
    optimizer = getattr(precond, method)(model, loss_fn, lr=lr, **options)

    def loss() -> float:
        with torch.no_grad():
            return float(loss_fn(model(x[:512]), y[:512]))

    start, begin, worst = loss(), time.process_time(), 0.0
    end = math.inf
    try:
        for _ in range(steps):
            rows = torch.randint(0, len(x), (batch,))
            optimizer.zero_grad()
            value = loss_fn(model(x[rows]), y[rows])
            worst = max(worst, float(value)) if math.isfinite(float(value)) else math.inf
            value.backward()
            optimizer.step()
        end = loss()
    except (RuntimeError, ArithmeticError, SolverError) as error:
        worst = math.inf
        end = math.inf
        message = str(error)[:80]
    else:
        message = ""
    optimizer.detach()
    seconds = time.process_time() - begin
    ratio = end / start if math.isfinite(end) else math.inf
    return {"ratio": ratio, "worst": worst / start, "seconds": seconds, "skipped": optimizer.skipped, "error": message}


def main() -> None:
    """Print a table: a row per problem, a column per learning rate; worst ratio of the seeds, ``!`` per divergence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--problems", nargs="*", default=tuple(PROBLEMS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for method in given.methods:
        diverged = total = 0
        print(f"{method} {given.options or ''}")
        for problem in given.problems:
            cells, seconds = [], 0.0
            for lr in RATES:
                runs = [run(method, problem, lr, s, given.steps, given.batch, **given.options) for s in SEEDS]
                bad = [r for r in runs if not r["ratio"] <= 1]
                diverged, total = diverged + len(bad), total + len(runs)
                seconds += sum(r["seconds"] for r in runs)
                cells.append(f"{max(r['ratio'] for r in runs):9.3g}{'!' * len(bad):<3}")
            print(f"  {problem:14} {' '.join(cells)}  {1e3 * seconds / given.steps / 3 / len(RATES):6.1f} ms a step")
        print(f"  diverged: {diverged} of {total}", flush=True)


if __name__ == "__main__":
    main()
