"""The least that a step of K-FAC or EKFAC takes: ``python -m tests.benchmarks.floors mlp,gpt``.

Times of bare kernels on the layers' own shapes, warm, without Python between them, as minima; a product of which one
triangle is needed counts half. In steps of SGD, whose own step is part of them. A step that keeps its inverses pays for
the directions and the passes over the parameters; one that refreshes pays for the rest as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tests.benchmarks.harness  # noqa: F401  (its files import each other by their bare names)

from peers_optim import sgd  # isort: skip
from workloads import make  # isort: skip

Layer = tuple[Tensor, Tensor]  # inputs (rows, d_in) with their ones, output gradients (rows, d_out)


def cost(run: Callable[[], object], times: int = 7) -> float:
    """CPU milliseconds, the least of some."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return 1e3 * best


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


def parts(name: str) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step of SGD, and of what K-FAC adds to it."""
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

    found = {
        "directions": cost(directions),
        "passes over parameters": cost(passes),
        "second backward pass": cost(back),
        "Gram matrices": 0.5 * cost(moments),
        "averages and shifts": cost(lambda: [(torch.lerp(f, f, 0.5, out=f), f.clone()) for f in flat]),
        "Cholesky": cost(lambda: [torch.linalg.cholesky_ex(f) for f in flat]),
        "explicit inverses": cost(inverses),
        "momentum in the new metric": 0.5 * cost(lambda: [B @ m @ A for (A, B), m in zip(factors, v, strict=True)]),
        "to the eigenbasis and back": cost(eigenbasis),
        "eigh": cost(lambda: [torch.linalg.eigh(f) for f in flat], 2),
    }
    return cost(sgd(w), 9), found


def main() -> None:
    torch.set_num_threads(1)
    for name in (sys.argv[1] if len(sys.argv) > 1 else "mlp,cnn,gpt,vit").split(","):
        plain, of = parts(name)
        kept = of["directions"] + of["passes over parameters"]
        refresh = sum(of[p] for p in ("second backward pass", "Gram matrices", "averages and shifts"))
        cholesky = refresh + of["Cholesky"] + of["explicit inverses"] + of["momentum in the new metric"]
        turned = of["to the eigenbasis and back"] + of["passes over parameters"]
        eigen = refresh + of["eigh"] + 2 * of["momentum in the new metric"]
        print(f"{name}: SGD {plain:.1f} ms; " + ", ".join(f"{part} {ms:.1f}" for part, ms in of.items()))
        for method, every, sometimes in (("KFAC", kept, cholesky), ("EKFAC", turned, eigen)):
            at = [1 + (every + sometimes / period) / plain for period in (1, 10)]
            print(f"{name}: {method} every 1 / every 10 at least {at[0]:.2f} / {at[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
