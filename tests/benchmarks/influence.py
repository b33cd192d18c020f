"""Seconds and memory of influence scores, against per-sample gradients by ``torch.func``.

    python -m tests.benchmarks.influence [--examples 128]

The language model of :mod:`tests.benchmarks.problems`, untrained, windows of 16 characters, EKFAC. Both ways get the
same curvature and form the same scores, queries included; the last column is how far they are apart. Runs alternate,
seconds are of CPU, the best of two. Memory is the largest sum of tensors that were made and alive at once beyond those
of the model and the data, as torch's profiler counts them. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import curvature
from solvers import LinearOperator
from tests.benchmarks.problems import Transformer, language_model
from tests.peak_memory import peak_of_tensors

BATCH = 32


class ByFunc:
    """The same scores from per-sample gradients of ``torch.func``, whole, a batch at a time."""

    def __init__(self, model: nn.Module, inverse: LinearOperator) -> None:
        self.model, self.inverse = model, inverse
        self.values = {name: p.detach() for name, p in model.named_parameters()}
        self.gradients = vmap(grad(self._loss), in_dims=(None, 0, 0))

    def _loss(self, values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(self.model, values, (x.unsqueeze(0),))[0]
        return F.cross_entropy(logits, y, reduction="sum")

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Per-sample gradients ``(n, P)``."""
        found = self.gradients(self.values, x, y)
        return torch.cat([found[name].flatten(1) for name in self.values], dim=1)

    def __call__(self, batches: list[Any], queries: list[Any]) -> Tensor:
        """Scores ``(Q, N)``."""
        rows = torch.cat([self.inverse @ self.rows(*batch) for batch in queries])
        return torch.cat([rows @ self.rows(*batch).T for batch in batches], dim=1)


def seconds(run: Callable[[], Any]) -> float:
    """Of CPU."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=128)
    examples = parser.parse_args().examples
    problem = language_model(0)
    model, loss_fn = Transformer(), nn.CrossEntropyLoss()
    x, y = problem.inputs[: examples + 64], problem.targets[: examples + 64]
    batches = list(zip(x[:examples].split(BATCH), y[:examples].split(BATCH), strict=True))
    held_out = x[examples:], y[examples:]
    numbers = sum(p.numel() for p in model.parameters())
    given: dict[str, Any] = {"class_dim": -1, "progress": False}
    made: list[LinearOperator] = []
    spent = seconds(lambda: made.append(curvature.ggn(model, loss_fn, batches, structure="ekfac", kind="mc", **given)))
    C = made[0]
    inverse = C.inverse(0.01)
    print(f"{numbers} parameters, {examples} examples. EKFAC: {1e3 * spent / examples:.2f} ms for an example.\n")
    naive = ByFunc(model, inverse)
    print("| queries | way | ms for an example | MiB | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    for number in (1, 16, 64):
        queries = list(zip(*(part[:number].split(BATCH) for part in held_out), strict=True))
        expected = naive(batches, queries)

        def ours(queries: Any = queries, **options: Any) -> Tensor:
            return curvature.influence(
                model, loss_fn, batches, queries, curvature=C, damping=0.01, **given, **options
            ).scores

        ways: dict[str, Callable[[], Tensor]] = {
            "torch.func": lambda queries=queries: naive(batches, queries),
            "influence": ours,
            "influence, query_rank=4": lambda: ours(query_rank=4),
            "influence, by_position": lambda: ours(by_position=True),
        }
        times = {name: min(seconds(run) for _ in range(2)) for name, run in ways.items()}
        for name, run in ways.items():
            off = (run() - expected).abs().max() / expected.abs().max()
            memory = peak_of_tensors(run) / 2**20
            print(f"| {number} | {name} | {1e3 * times[name] / examples:.2f} | {memory:.0f} | {off:.1e} |")


if __name__ == "__main__":
    main()
