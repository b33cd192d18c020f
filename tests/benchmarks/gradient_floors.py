"""The least that SOAP, Shampoo, PSGD, Muon and SINGD take: ``python -m tests.benchmarks.gradient_floors mlp``.

Bare kernels on the shapes of a workload's own parameters and matrices, without Python between them: products, of which
those with one triangle to compute count half, decompositions as the method takes them, and passes over parameters. They
are timed in turn with a step of SGD, which is part of every step, and with a step of the method, in one process; of all
the medians of the rounds are taken, CPU time of one thread. A line gives the floor, ours, and ours over the floor, with
refreshes in every step and in every tenth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import precond
import tests.benchmarks.harness  # noqa: F401  (its files import each other by their bare names)
from precond.gradient.matrices import matrix_shape, multiply, unfolded
from solvers.precision import multiplies_bfloat16_faster
from tests.benchmarks.floors import layers_of

import ours  # isort: skip  # noqa: F401  (registers our entries)
from registry import ENTRIES  # isort: skip
from workloads import Workload, make  # isort: skip

METHODS = ("SOAP", "Shampoo", "PSGD", "Muon", "SINGD")


@dataclass(frozen=True)
class Part:
    """Kernels of a step.

    Attributes:
        run: Calls them.
        share: What of their time counts: half where one triangle of a product is needed.
        refresh: Whether only a step that refreshes needs them.
    """

    run: Callable[[], object]
    share: float = 1.0
    refresh: bool = False


@dataclass(frozen=True)
class Axes:
    """A gradient with the matrices of its axes: one parameter, or one that is trained by passes alone."""

    g: Tensor
    matrices: dict[int, Tensor]

    @property
    def grams(self) -> list[Tensor]:
        """The rows whose products the factors are."""
        return [unfolded(self.g[None], axis)[0] for axis in self.matrices]

    def multiplied(self) -> Tensor:
        return multiply(self.g[None], {axis: matrix[None] for axis, matrix in self.matrices.items()})


def axes_of(optimizer: Any) -> list[Axes]:
    """As the optimizer itself chooses them: axes of its first state, with random orthogonal matrices."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.first_state(p, group)
            named = {tuple(name.split(".")): x for name, x in state.items() if isinstance(x, Tensor)}
            sizes = {
                int(k[-1]): len(x) for k, x in named.items() if k[-2:-1] in (("basis",), ("root",)) and x.ndim == 2
            }
            shape = state.get("exp_avg", p).shape
            bases = {axis: torch.linalg.qr(torch.randn(n, n))[0] for axis, n in sizes.items()}
            found.append(Axes(torch.randn(shape), bases))
    return found


def factors_of(axes: Sequence[Axes]) -> list[Tensor]:
    """A positive definite matrix for each axis."""
    return [r @ r.mT / r.shape[-1] + 0.1 * torch.eye(len(r)) for a in axes for r in a.grams]


def passes(gradients: Sequence[Tensor], times: int) -> Callable[[], object]:
    """Passes that read two tensors of every shape and write one."""
    state = [torch.ones_like(g) for g in gradients]
    return lambda: [torch._foreach_lerp_(state, gradients, 0.1) for _ in range(times)]


def soap(w: Workload) -> dict[str, Part]:
    axes = axes_of(precond.SOAP(w.params, lr=1e-4))
    factors, bases = factors_of(axes), [q for a in axes for q in a.matrices.values()]

    def orthonormal() -> None:
        for q in bases:
            torch.linalg.householder_product(*torch.geqrf(q))

    return {
        "rotations": Part(lambda: [a.multiplied() for a in axes for _ in range(2)]),
        "Gram matrices": Part(lambda: [r @ r.mT for a in axes for r in a.grams], 0.5),
        "passes": Part(passes([a.g for a in axes], 6)),  # two moments, the root, two quotients, the step
        "A Q": Part(lambda: [f @ q for f, q in zip(factors, bases, strict=True)], refresh=True),
        "QR": Part(orthonormal, refresh=True),
        "momentum turned": Part(lambda: [a.multiplied() for a in axes for _ in range(2)], refresh=True),
    }


def shampoo(w: Workload) -> dict[str, Part]:
    axes = axes_of(precond.Shampoo(w.params, lr=1e-4))
    factors = factors_of(axes)
    return {
        "roots applied": Part(lambda: [a.multiplied() for a in axes]),
        "Gram matrices": Part(lambda: [r @ r.mT for a in axes for r in a.grams], 0.5),
        "passes": Part(passes([a.g for a in axes], 7)),  # two moments, the root, a quotient, two norms, the step
        "eigh": Part(lambda: [torch.linalg.eigh(f) for f in factors], refresh=True),
        "roots": Part(lambda: [f @ f.mT for f in factors], 0.5, refresh=True),
    }


def psgd(w: Workload) -> dict[str, Part]:
    axes = axes_of(precond.PSGD(w.params, lr=1e-4))
    roots = [q for a in axes for q in a.matrices.values()]
    return {
        "P applied": Part(lambda: [a.multiplied() for a in axes]),
        "passes": Part(passes([a.g for a in axes], 4)),  # the average, its size, the bound on it, the step
        "P h": Part(lambda: [a.multiplied() for a in axes], refresh=True),
        "Gram matrices of P h": Part(lambda: [r @ r.mT for a in axes for r in a.grams], 0.5, refresh=True),
        "P, and that of the noise": Part(lambda: [q.mT @ q for q in roots for _ in range(2)], 0.5, refresh=True),
        "the step of Q, and its turn": Part(lambda: [q @ q for q in roots for _ in range(3)], refresh=True),
    }


def muon(w: Workload) -> dict[str, Part]:
    """Two polynomials of the Gram matrix, of two and of three steps, where that costs less than five steps."""
    optimizer = precond.Muon(precond.param_groups(w.model, precond.Muon, (w.x, w.y)), lr=1e-4)
    all_of = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    kept = [p for p, group in all_of if not optimizer.diagonal(optimizer.initial_state(p, group))]
    dtype = torch.bfloat16 if multiplies_bfloat16_faster(torch.device("cpu")) else torch.float32
    wide = [torch.randn(sorted(matrix_shape(tuple(p.shape)))).to(dtype) for p in kept]
    squares = [x @ x.mT for x in wide]
    # Of k steps together: k squares, k - 1 products of factors and 2 (k - 1) for the next R; else one and X again.
    joint = [17 * len(x) + 4 * x.shape[1] < 5 * (2 * x.shape[1] + len(x)) for x in wide]
    small = [(5 + 3 + 6 if many else 5, 2 if many else 5) for many in joint]
    every = list(zip(wide, squares, small, strict=True))
    return {
        "Gram matrices": Part(lambda: [x @ x.mT for x, _, (_, times) in every for _ in range(times)], 0.5),
        "polynomials": Part(lambda: [r @ r for _, r, (often, _) in every for _ in range(often)], 0.5),
        "times X": Part(lambda: [r @ x for x, r, (_, times) in every for _ in range(times)]),
        "passes": Part(passes([torch.randn(p.shape) for p in w.params], 4)),  # average, look ahead, scale, step
    }


def singd(w: Workload) -> dict[str, Part]:
    layers, back = layers_of(w)
    gradients = [torch.randn(g.shape[1], a.shape[1]) for a, g in layers]
    factors = [x.T @ x / len(x) + torch.eye(x.shape[1]) for layer in layers for x in layer]

    def directions() -> None:
        for (a, g), A, B, m in zip(layers, factors[::2], factors[1::2], gradients, strict=True):
            rows = len(a) * (m.numel() + sum(s * s for s in m.shape)) < 0.8 * m.numel() * sum(m.shape)
            _ = (g @ B).T @ (a @ A) if rows else B @ m @ A

    return {
        "directions": Part(directions),
        "passes": Part(passes([torch.randn(p.shape) for p in w.params], 4)),  # momentum, two inner products, the step
        "second backward pass": Part(back, refresh=True),
        "moments": Part(lambda: [x.T @ x for layer in layers for x in layer], 0.5, refresh=True),
        "A K, and K m": Part(lambda: [f @ f for f in factors for _ in range(2)], refresh=True),
        "H, and K K^T": Part(lambda: [f @ f for f in factors for _ in range(2)], 0.5, refresh=True),
        "passes over factors": Part(passes(factors, 4), refresh=True),  # H to m, its size, the momentum, K
    }


PARTS: dict[str, Callable[[Workload], dict[str, Part]]] = {
    "SOAP": soap,
    "Shampoo": shampoo,
    "PSGD": psgd,
    "Muon": muon,
    "SINGD": singd,
}


@dataclass(frozen=True)
class Found:
    """In CPU milliseconds of one step: SGD, the parts, and ours, by period."""

    plain: float
    parts: dict[str, float]
    floor: dict[int, float]
    ours: dict[int, float]

    def lines(self, title: str) -> list[str]:
        counted = ", ".join(f"{name} {ms:.1f}" for name, ms in self.parts.items())
        out = [f"{title}: SGD {self.plain:.1f} ms; {counted}"]
        of = {"floor": self.floor, "ours": self.ours}
        steps = {name: [ms / self.plain for ms in found.values()] for name, found in of.items()}
        steps["ours over the floor"] = [self.ours[k] / self.floor[k] for k in self.ours]
        return out + [f"{title}: {name} {' / '.join(f'{x:.2f}' for x in found)}" for name, found in steps.items()]


def measured(method: str, name: str, rounds: int = 5, periods: Sequence[int] = (1, 10)) -> Found:
    """Medians over rounds, in each of which everything is run in turn."""
    entry = {e.name: e for e in ENTRIES}
    fixed = entry[f"precond {method}"].meta.get("fixed")
    steps = {k: entry[f"precond {method}"].build(make(name), interval=k) for k in periods[: 1 if fixed else None]}
    plain, parts = entry["SGD"].build(make(name)), PARTS[method](make(name))
    runs = {"": (plain, 1), **{part: (kernels.run, 1) for part, kernels in parts.items()}}
    runs |= {f"every {k}": (step, k) for k, step in steps.items()}
    taken: dict[str, list[float]] = {of: [] for of in runs}
    for turn in range(rounds + 1):  # the first one, with first steps and cold kernels, does not count
        for of, (run, often) in runs.items():
            begin = time.process_time()
            for _ in range(often):
                run()
            if turn:
                taken[of].append(1e3 * (time.process_time() - begin) / often)
    ms = {of: median(times) for of, times in taken.items()}
    counted = {part: kernels.share * ms[part] for part, kernels in parts.items()}
    floor = {k: ms[""] + sum(x / (k if parts[part].refresh else 1) for part, x in counted.items()) for k in steps}
    return Found(ms[""], counted, floor, {k: ms[f"every {k}"] for k in steps})


def main() -> None:
    """Print the parts, the floor, ours, and their ratio of each workload and method."""
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("workloads", nargs="?", default="mlp,cnn,gpt,vit")
    read.add_argument("--methods", default=",".join(METHODS))
    read.add_argument("--rounds", type=int, default=5)
    given = read.parse_args()
    torch.set_num_threads(1)
    for name in given.workloads.split(","):
        for method in given.methods.split(","):
            print("\n".join(measured(method, name, given.rounds).lines(f"{name}, {method}")), flush=True)


if __name__ == "__main__":
    main()
