"""The least that a step of K-FAC or EKFAC takes: ``python -m tests.benchmarks.floors mlp,gpt 9 KFAC``.

Times of bare kernels on the layers' own shapes, without Python between them; a product of which one triangle is needed
counts half. In steps of SGD, whose own step is part of them. A step that keeps its inverses pays for the directions and
the passes over the parameters; one that refreshes pays for the rest as well.

A round takes each kernel once, a step of SGD before and after, and whole periods of our own steps, all in one process
and by its CPU time, so that whatever else the machine does meets all of them alike. Given are medians over rounds, of
ratios within a round. Arguments: workloads, number of rounds, methods.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import tests.benchmarks.harness  # noqa: F401  (its files import each other by their bare names)

import ours  # noqa: F401  isort: skip  (registers its entries)
from peers_optim import sgd  # isort: skip
from registry import ENTRIES  # isort: skip
from workloads import make  # isort: skip

Layer = tuple[Tensor, Tensor]  # inputs (rows, d_in) with their ones, output gradients (rows, d_out)
Kernels = dict[str, tuple[Callable[[], object], float]]  # and the part of its time that counts

#: Of a step with kept inverses, of one with new statistics, and of one that renews inverses beside that.
PARTS = {
    "KFAC": (
        ("directions", "passes over parameters"),
        ("second backward pass", "Gram matrices", "averages and shifts"),
        ("Cholesky", "explicit inverses", "momentum in the new metric"),
    ),
    "EKFAC": (
        ("to the eigenbasis and back", "passes over parameters"),
        ("second backward pass", "Gram matrices", "averages and shifts", "squares in the eigenbasis"),
        ("eigh", "turn of the spectrum", "momentum in the new metric", "momentum in the new metric"),
    ),
}


def cost(run: Callable[[], object], times: int = 1) -> float:
    """Mean CPU milliseconds."""
    start = time.process_time()
    for _ in range(times):
        run()
    return 1e3 * (time.process_time() - start) / times


def layers_of(w: Any) -> tuple[list[Layer], Callable[[], object]]:
    """Inputs and output gradients of the dense and convolutional layers; and the pass that gives the latter."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append((m, args[0].detach(), out)))
        for m in w.model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    loss = w.loss()
    for hook in hooks:
        hook.remove()

    def back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [out for *_, out in seen], retain_graph=True)

    found = []
    for (m, x, out), _ in zip(seen, back(), strict=True):
        if isinstance(m, nn.Conv2d):
            a = nn.functional.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).mT.flatten(0, 1)
            g = torch.randn(len(a), out.shape[1])
        else:
            a, g = x.reshape(-1, x.shape[-1]), torch.randn(x.numel() // x.shape[-1], out.shape[-1])
        found.append((torch.cat([a, torch.ones(len(a), 1)], 1), g))
    return found, back


def kernels(name: str) -> Kernels:
    """What K-FAC and EKFAC add to a step of SGD."""
    w = make(name)
    layers, back = layers_of(w)
    factors = [(a.T @ a / len(a) + torch.eye(a.shape[1]), g.T @ g / len(g) + torch.eye(g.shape[1])) for a, g in layers]
    flat = [f for pair in factors for f in pair]
    v = [torch.randn(g.shape[1], a.shape[1]) for a, g in layers]
    lower = [torch.linalg.cholesky(f) for f in flat]
    few = [
        len(a) * (m.numel() + sum(s * s for s in m.shape)) < 0.8 * m.numel() * sum(m.shape)
        for (a, _), m in zip(layers, v, strict=True)
    ]

    def moments() -> None:
        for a, g in layers:  # where the loss has one term for each example, its positions are reduced first
            if not w.tokens and w.x.dim() == 3 and len(a) > len(w.x):
                a, g = a.view(len(w.x), -1, a.shape[1]).mean(1), g.view(len(w.x), -1, g.shape[1]).sum(1)
            _ = a.T @ a, g.T @ g

    def directions() -> None:
        for (a, g), (A, B), m, by_rows in zip(layers, factors, v, few, strict=True):
            _ = (g @ B).T @ (a @ A) if by_rows else B @ m @ A

    def eigenbasis() -> None:  # there by the rows or the gradient, and back
        for (a, g), (A, B), m, by_rows in zip(layers, factors, v, few, strict=True):
            turned = (g @ B).T @ (a @ A) if by_rows else B @ m @ A
            _ = B @ turned @ A

    def squares() -> None:  # of the gradient of each example
        n = len(w.x)
        for (a, g), (A, B), m in zip(layers, factors, v, strict=True):
            if len(a) == n:
                _ = (g @ B).square().T @ (a @ A).square()
                continue
            by_rows = len(a) // n * (len(B) ** 2 + len(A) ** 2) < m.numel() * sum(m.shape)
            a, g = (a @ A, g @ B) if by_rows else (a, g)
            step = max(1, 2**17 // m.numel())  # what the caches hold
            pairs = zip(g.view(n, -1, len(B)).split(step), a.view(n, -1, len(A)).split(step), strict=True)
            each = (left.mT @ right for left, right in pairs)
            _ = sum((d if by_rows else B @ (d @ A)).square().sum(0) for d in each)

    def turn() -> None:
        for (A, B), m in zip(factors, v, strict=True):
            _ = (B.T @ B).square() @ m @ (A.T @ A).square()

    def passes() -> None:  # momentum, direction, two inner products, step
        for m in v:
            momentum = 0.9 * m + m
            _ = (
                torch.dot(m.view(-1), m.view(-1)),
                torch.dot(momentum.view(-1), m.view(-1)),
                m.add_(momentum, alpha=-1e-9),
            )

    def inverses() -> None:
        for (a, _), m, by_rows, B, A in zip(layers, v, few, lower[1::2], lower[::2], strict=True):
            for L, other in ((B, m.shape[1]), (A, m.shape[0])):
                if 2 * (len(a) if by_rows else other) > len(L):
                    torch.cholesky_inverse(L)

    return {
        "directions": (directions, 1),
        "passes over parameters": (passes, 1),
        "second backward pass": (back, 1),
        "Gram matrices": (moments, 0.5),
        "averages and shifts": (lambda: [(torch.lerp(f, f, 0.5, out=f), f.clone()) for f in flat], 1),
        "Cholesky": (lambda: [torch.linalg.cholesky_ex(f) for f in flat], 1),
        "explicit inverses": (inverses, 1),
        "momentum in the new metric": (lambda: [B @ m @ A for (A, B), m in zip(factors, v, strict=True)], 0.5),
        "to the eigenbasis and back": (eigenbasis, 1),
        "squares in the eigenbasis": (squares, 1),
        "turn of the spectrum": (turn, 1),
        "eigh": (lambda: [torch.linalg.eigh(f) for f in flat], 1),
    }


def rounds(name: str, methods: list[str], times: int) -> list[dict[str, float]]:
    """CPU milliseconds of a step of SGD, of the kernels and of our own steps, in rounds."""
    wanted = {part for method in methods for group in PARTS[method] for part in group}
    of = {part: kernel for part, kernel in kernels(name).items() if part in wanted}
    entries = {entry.name: entry.build for entry in ENTRIES}
    steps = {(m, n): entries[f"precond {m}"](make(name), interval=n) for m in methods for n in (1, 10)}
    plain = sgd(make(name))
    for (_, period), step in steps.items():
        cost(step, 2 + period)
    out = []
    for _ in range(times):
        found: dict[str, float] = {}
        before = [cost(plain, 3)]
        for part, (run, share) in of.items():
            found[part] = share * cost(run)
        before.append(cost(plain, 3))
        for (method, period), step in steps.items():
            found[f"{method} every {period}"] = cost(step, period)
            before.append(cost(plain, 3))
        out.append(found | {"SGD": statistics.fmean(before)})
    return out


def least(method: str, period: int, ms: Mapping[str, float]) -> float:
    """The least that a step takes on average over a period, in steps of SGD."""
    kept, statistic, renewed = (sum(ms[part] for part in group) for group in PARTS[method])
    return 1 + (kept + (statistic + renewed) / period) / ms["SGD"]


def main() -> None:
    torch.set_num_threads(1)
    names, times, methods = [*sys.argv[1:], *("mlp,cnn,gpt,vit", "9", "KFAC,EKFAC")[len(sys.argv) - 1 :]]
    for name in names.split(","):
        found = rounds(name, methods.split(","), int(times))
        medians = {part: statistics.median(ms[part] for ms in found) for part in found[0]}
        print(f"{name}: ms: " + ", ".join(f"{part} {ms:.1f}" for part, ms in medians.items()))
        for method in methods.split(","):
            for period in (1, 10):
                floor = [least(method, period, ms) for ms in found]
                own = [ms[f"{method} every {period}"] / ms["SGD"] for ms in found]
                over = statistics.quantiles([a / b for a, b in zip(own, floor, strict=True)], n=4)
                print(
                    f"{name}: {method} every {period}: at least {statistics.median(floor):.2f}, ours "
                    f"{statistics.median(own):.2f}, over the floor {over[1]:.2f} ({over[0]:.2f} to {over[2]:.2f}, "
                    f"n={len(found)})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
