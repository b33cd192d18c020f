"""How time and memory of a step grow: ``python -m tests.benchmarks.scale large``, and ``sweep --picture FILE``.

``large`` takes three steps of every method in a process of its own on models that are large in one way: a layer of
4,096 x 4,096, a vocabulary of 50,000 with its head untied or tied, a transformer of 100 million parameters. A method
that does not end within ``--limit`` seconds of CPU time, or wants more than ``--memory`` gigabytes, is named so.
``sweep`` times small models of growing width, depth, batch and number of classes, and fits an exponent to each.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import precond
import tests.benchmarks.harness  # noqa: F401  (its files import each other by their bare names)
from tests.peak_memory import peak_kib

from workloads import GPT  # isort: skip

ROOT = Path(__file__).parents[2]


class Tokens(nn.Module):
    """Embedding, one hidden layer, and a head over the vocabulary."""

    def __init__(self, vocabulary: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x)))).flatten(0, 1)


class Flat(nn.Module):
    """A model whose positions are examples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, 1)


Case = tuple[nn.Module, Tensor, Tensor]


def perceptron(sizes: list[int], batch: int) -> Case:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))


def tokens(vocabulary: int, width: int, tied: bool) -> Case:
    ids = torch.randint(vocabulary, (8, 17))
    return Tokens(vocabulary, width, tied), ids[:, :-1], ids[:, 1:].flatten()


def language_model(vocabulary: int, width: int, depth: int, length: int) -> Case:
    """A transformer, and one sequence."""
    ids = torch.randint(vocabulary, (1, length + 1))
    return Flat(GPT(vocabulary, width, depth, width // 64, length)), ids[:, :-1], ids[:, 1:].flatten()


CASES: dict[str, Callable[[], Case]] = {
    "a layer of 4,096 x 4,096": lambda: perceptron([64, 4096, 4096, 10], 64),
    "50,000 tokens": lambda: tokens(50_000, 64, False),
    "50,000 tokens, tied": lambda: tokens(50_000, 64, True),
    "100 M parameters": lambda: language_model(10_000, 768, 12, 64),
    "small": lambda: perceptron([8, 16, 4], 8),
}


def by_gradient(name: str) -> Callable[..., Any]:
    return lambda model, loss_fn: getattr(precond, name)(model.parameters(), lr=1e-3)


def by_layers(name: str, **options: Any) -> Callable[..., Any]:
    return lambda model, loss_fn: getattr(precond, name)(model, loss_fn, lr=1e-3, **options)


METHODS: dict[str, Callable[..., Any]] = {
    "SGD": lambda model, loss_fn: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "AdamW": lambda model, loss_fn: torch.optim.AdamW(model.parameters()),
    **{
        name: by_gradient(name)
        for name in ("Muon", "SOAP", "Shampoo", "KLShampoo", "SPlus", "PSGD", "SOAPMuon", "MFAC", "GaLore")
    },
    **{name: by_layers(name) for name in ("KFAC", "EKFAC", "SINGD", "TNT", "KBFGS", "SENG")},
    "KFAC(empirical)": by_layers("KFAC", fisher="empirical"),
}


def steps(make: Callable[..., Any], case: Case, n: int) -> list[float]:
    """CPU seconds of each of n steps of the plain loop."""
    model, x, y = case
    loss_fn = nn.CrossEntropyLoss()
    optimizer = make(model, loss_fn)
    taken = []
    for _ in range(n):
        start = time.process_time()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        taken.append(time.process_time() - start)
    return taken


def child(case: str, method: str, limit: int, memory: float) -> None:
    """Three steps, as JSON; the system ends a process that exceeds its limits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    made = CASES[case]()
    before = peak_kib()
    print(json.dumps({"seconds": steps(METHODS[method], made, 3), "peak": peak_kib() - before}))


def in_a_process(case: str, method: str, limit: int, memory: float) -> dict[str, Any] | str:
    """Seconds of each step and KiB above the model, or what went wrong."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "child", "--case", case, "--method", method]
    done = subprocess.run(
        [*command, "--limit", str(limit), "--memory", str(memory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if done.returncode < 0:
        return f"over {limit} s"
    return done.stderr.strip().splitlines()[-1][:160]


def large(cases: list[str], methods: list[str], limit: int, memory: float) -> None:
    for case in cases:
        base = in_a_process(case, "SGD", limit, memory)
        assert isinstance(base, dict), base
        plain = min(base["seconds"])
        print(f"\n{case}: a step of SGD takes {plain:.3f} s and {base['peak'] / 2**20:.2f} GiB above the model\n")
        print("| method | first step | later step | peak over SGD's |\n| --- | --- | --- | --- |", flush=True)
        for method in methods:
            found = in_a_process(case, method, limit, memory)
            if isinstance(found, str):
                print(f"| {method} | {found} | | |", flush=True)
                continue
            first, later = found["seconds"][0] / plain, min(found["seconds"][1:]) / plain
            print(f"| {method} | {first:.1f} | {later:.2f} | {found['peak'] / base['peak']:.2f} |", flush=True)


#: What grows, its values, and the exponents of SGD's step and of a refresh of dense factors.
SWEEPS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "width": ((128, 256, 512, 1024), 2, 3),
    "depth": ((1, 2, 4, 8), 1, 1),
    "batch": ((64, 128, 256, 512), 1, 0),
    "classes": ((16, 64, 256, 1024), 1, 3),
}


def model_of(axis: str, value: int) -> Case:
    width, depth, batch, classes = (value if axis == name else rest for name, rest in zip(SWEEPS, (256, 2, 128, 10)))  # noqa: B905
    return perceptron([width] * (depth + 1) + [classes], batch)


def sweep(picture: str | None, methods: list[str]) -> dict[str, dict[str, list[float]]]:
    """Median seconds of a step over ten, with the refreshes among them, by axis and method."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for axis, (values, _, _) in SWEEPS.items():
        found[axis] = {}
        for method in methods:
            means = []
            for value in values:
                torch.manual_seed(0)
                taken = steps(METHODS[method], model_of(axis, value), 12)
                means.append(sum(taken[2:]) / 10)
            found[axis][method] = means
            slope = math.log(means[-1] / means[-2]) / math.log(values[-1] / values[-2])
            print(f"{axis:8s} {method:16s} {[f'{1e3 * s:.2f} ms' for s in means]}, exponent {slope:.2f}", flush=True)
    if picture:
        draw(found, picture)
    return found


def draw(found: dict[str, dict[str, list[float]]], picture: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), layout="constrained", sharey=True)
    for ax, (axis, lines) in zip(axes, found.items(), strict=True):
        values, plain, dense = SWEEPS[axis]
        for method, seconds in lines.items():
            ax.loglog(values, [1e3 * s for s in seconds], marker="o", label=method)
        top = 1e3 * max(seconds[-1] for seconds in lines.values())
        low = 1e3 * min(seconds[-1] for seconds in lines.values())
        for height, exponent, side in ((1.5 * top, dense, "bottom"), (low / 1.5, plain, "top")):
            guide = [height * (v / values[-1]) ** exponent for v in values]
            ax.loglog(values, guide, color="grey", linestyle=":")
            place = {"ha": "right", "va": side, "fontsize": 8, "color": "grey"}
            ax.annotate(f"{axis}$^{exponent}$", (values[-1], height), **place)
        ax.set_xlabel(axis)
        ax.set_xticks(values, [str(v) for v in values])
        ax.minorticks_off()
    every = [1e3 * s for lines in found.values() for seconds in lines.values() for s in seconds]
    axes[0].set_ylim(min(every) / 3, 4 * max(every))  # the guides may leave it
    axes[0].set_ylabel("ms per step")
    axes[0].legend(fontsize=8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("what", choices=("large", "sweep", "child"))
    read.add_argument("--case", default="")
    read.add_argument("--method", default="")
    read.add_argument("--limit", type=int, default=120, help="seconds of CPU time for three steps")
    read.add_argument("--memory", type=float, default=12.0, help="gigabytes of address space")
    read.add_argument("--picture", default=None)
    chosen = read.parse_args()
    methods = chosen.method.split(",") if chosen.method else list(METHODS)
    if chosen.what == "child":
        child(chosen.case, chosen.method, chosen.limit, chosen.memory)
    elif chosen.what == "large":
        large([case for case in CASES if chosen.case in case and case != "small"], methods, chosen.limit, chosen.memory)
    else:
        sweep(chosen.picture, methods)


if __name__ == "__main__":
    main()
