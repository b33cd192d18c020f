"""Fits of a Laplace approximation, backend beside backend: ``python -m tests.benchmarks.laplace_speed diag mlp``.

CPU time of whole fits (``Laplace(...).fit(loader)``, classification, all weights) in one process, the backends in
alternation, medians. A backend that cannot serve a model is named with its reason; one that takes more memory than
``--memory`` gigabytes fails by itself.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from laplace import Laplace
from laplace.curvature import asdl, backpack, curvlinops
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.laplace import EFBackend, GGNBackend

GGN = (GGNBackend, curvlinops.CurvlinopsGGN, backpack.BackPackGGN, asdl.AsdlGGN)
EF = (EFBackend, curvlinops.CurvlinopsEF, backpack.BackPackEF, asdl.AsdlEF)


class Block(nn.Module):
    """Pre-norm attention, of plain products (forward mode has no rule for the fused kernel), and a perceptron."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (d // self.heads) ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class ViT(nn.Module):
    """16 patches; the norms are frozen for ``kron``, which other backends have no block for."""

    def __init__(self, d: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patch, self.head = nn.Linear(12, d), nn.Linear(d, classes)
        self.blocks = nn.Sequential(*(Block(d, 2) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x)).mean(1))


def mlp(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vit() -> nn.Module:
    """With frozen norms."""
    model = ViT()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    return model


#: Model, shape of an input, examples, batch size.
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "mlp": (lambda: mlp(64, 100, 50, 10), (64,), 1000, 250),
    "mlp-tiny": (lambda: mlp(20, 32, 24, 10), (20,), 1000, 250),
    "vit": (vit, (16, 12), 200, 50),
}


def measured(structure: str, workload: str, kinds: tuple[type, ...], repeats: int) -> dict[str, float | str]:
    """Median CPU seconds of a fit by backend, or why there is none."""
    torch.manual_seed(0)
    make, shape, examples, batch = WORKLOADS[workload]
    x, y = torch.randn(examples, *shape), torch.randint(10, (examples,))
    loader, base = DataLoader(TensorDataset(x, y), batch_size=batch), make()
    found: dict[str, float | str] = {}
    runs: dict[str, Callable[[], None]] = {}

    def fit(kind: type, model: nn.Module) -> None:
        Laplace(model, "classification", "all", structure, backend=kind).fit(loader)

    for kind in kinds:
        run = functools.partial(fit, kind, copy.deepcopy(base))
        try:
            run()
            runs[kind.__name__] = run
        except Exception as error:  # whatever a backend raises for a model that it does not serve
            found[kind.__name__] = f"{type(error).__name__}: {str(error)[:80]}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return found | {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    """Print a line per backend."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("structure", choices=("diag", "kron", "full"))
    arguments.add_argument("workload", choices=tuple(WORKLOADS))
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--memory", type=float, default=10.0)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    limit = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kinds in (GGN, EF):
        for name, value in measured(options.structure, options.workload, kinds, options.repeats).items():
            shown = value if isinstance(value, str) else f"{value:.4f} s"
            print(f"{options.structure:5s} {options.workload:9s} {name:14s} {shown}", flush=True)


if __name__ == "__main__":
    main()
