"""Quantised and pruned models beside plain rounding, GPTQ, magnitude and SparseGPT: divergence from the original.

Three models are trained here; each row is the Kullback-Leibler divergence of the compressed model's predictions from
the original's on held-out data, in nats per prediction. Run it by

    python -m tests.benchmarks.compression --seeds 5
"""

from __future__ import annotations

import argparse
import ast
import copy
import dis
import inspect
import resource
import statistics
import time
import tokenize
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import curvature
from curvature.compression import Compression, Grid, prune, quantize
from curvature.compression.factors import layer_curvature
from curvature.compression.layers import matrices, select
from curvature.compression.quantization import quantize_matrix
from solvers import BlockDiagonal, Dense, Diagonal, Kronecker
from tests.benchmarks.problems import Block, FlatOutput


@dataclass
class Trained:
    """A trained model, calibration data and held-out inputs."""

    name: str
    model: nn.Module
    calibration: tuple[Tensor, Tensor]
    held_out: Tensor
    accuracy: float
    operators: dict[tuple[str, str], BlockDiagonal] = field(default_factory=dict)

    def curvature(self, structure: str, bias: str) -> BlockDiagonal:
        """The Fisher matrix on the calibration data, estimated once."""
        if (structure, bias) not in self.operators:
            self.operators[structure, bias] = curvature.fisher(
                self.model,
                nn.CrossEntropyLoss(),
                self.calibration,
                kind="mc",
                samples=4,
                structure=structure,
                bias=bias,
            )
        return self.operators[structure, bias]


class Characters(nn.Module):
    """A causal transformer of two blocks of 64 numbers, of which each position predicts the next character."""

    def __init__(self, context: int = 16, width: int = 64) -> None:
        super().__init__()
        self.symbols = nn.Embedding(96, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 96)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.symbols(ids) + self.positions)))


class Patches(nn.Module):
    """A vision transformer on digits: 16 patches of 2 x 2 pixels, two blocks of 48 numbers, pooled."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(PlainBlock(width), PlainBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class PlainBlock(nn.Module):
    """Attention without a mask and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (d // self.heads) ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, s, d))
        return x + self.mlp(self.norm_2(x))


def characters(seed: int, steps: int = 800) -> Trained:
    """The next character in the source of the standard library; the last tenth of the text is held out."""
    source = "".join(inspect.getsource(module) for module in (argparse, ast, dis, tokenize, typing))
    ids = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in source])
    windows = ids.unfold(0, 17, 16)
    cut = len(windows) * 9 // 10
    train, held_out = windows[:cut], windows[cut:]
    torch.manual_seed(seed)
    model = FlatOutput(Characters())
    accuracy = fit(model, train[:, :-1], train[:, 1:], steps, 32, seed, held_out[:, :-1], held_out[:, 1:])
    rows = torch.randperm(cut, generator=torch.Generator().manual_seed(seed))[:256]
    return Trained("characters", model, (train[rows, :-1], train[rows, 1:].flatten()), held_out[:256, :-1], accuracy)


def digits(seed: int, model: nn.Module, name: str, steps: int = 600) -> Trained:
    """Handwritten digits; 297 images are held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1500], order[1500:]
    accuracy = fit(model, images[train], targets[train], steps, 64, seed, images[held_out], targets[held_out])
    rows = train[:512]
    return Trained(name, model, (images[rows], targets[rows]), images[held_out], accuracy)


def vision(seed: int) -> Trained:
    """The vision transformer."""
    torch.manual_seed(seed)
    return digits(seed, Patches(), "vision transformer")


def convolutions(seed: int) -> Trained:
    """A convolutional network."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return digits(seed, model, "convolutions")


MODELS: dict[str, Callable[[int], Trained]] = {
    "characters": characters,
    "vision transformer": vision,
    "convolutions": convolutions,
}


def fit(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, seed: int, held_x: Tensor, held_y: Tensor
) -> float:
    """Train by AdamW and return the held-out accuracy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows].flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(held_x).argmax(1) == held_y.flatten()).float().mean())


@torch.no_grad()
def divergence(trained: Trained, model: nn.Module) -> float:
    """Mean KL divergence of the model's predictions from the original's on held-out inputs, in nats."""
    original, other = (m(trained.held_out).double().log_softmax(-1) for m in (trained.model, model))
    return float((original.exp() * (original - other)).sum(-1).mean())


def nearest(trained: Trained, bits: int) -> nn.Module:
    """Every weight to its nearest level, on the same grid."""
    model = copy.deepcopy(trained.model)
    for matrix, W, parameters in _weights(model, trained):
        matrix.write(Grid(bits).levels(W).nearest(W), parameters)
    return model


def magnitude(trained: Trained, sparsity: float | str) -> nn.Module:
    """The smallest weights of each matrix, or of each group of four, to zero."""
    model = copy.deepcopy(trained.model)
    for matrix, W, parameters in _weights(model, trained):
        matrix.write(W * magnitude_mask(W.abs(), sparsity), parameters)
    return model


def sparse_gpt(trained: Trained, sparsity: float | str, damping: float = 0.01, block: int = 128) -> nn.Module:
    """SparseGPT (Frantar and Alistarh 2023, algorithm 1): columns in order, masks by block, the rest compensated."""
    model = copy.deepcopy(trained.model)
    for matrix, W, parameters in _weights(model, trained, "foof"):
        A = matrix.operator.factors[1].to_dense().double()  # type: ignore[attr-defined]
        A.diagonal().add_(damping * A.diagonal().mean())
        U = torch.linalg.cholesky(torch.linalg.inv(A), upper=True).float()
        for start in range(0, W.shape[1], block):
            J = slice(start, min(start + block, W.shape[1]))
            mask = magnitude_mask((W[:, J] / U.diagonal()[J]).square(), sparsity)
            for j in range(J.start, J.stop):
                if isinstance(sparsity, str) and (j - start) % 4 == 0:
                    group = slice(j, min(j + 4, W.shape[1]))
                    own = magnitude_mask((W[:, group] / U.diagonal()[group]).square(), sparsity)
                    mask[:, group.start - start : group.stop - start] = own
                error = (W[:, j] * ~mask[:, j - start]) / U[j, j]
                W[:, j:] -= error[:, None] * U[j, j:]
                W[:, j] *= mask[:, j - start]
        matrix.write(W, parameters)
    return model


def magnitude_mask(size: Tensor, sparsity: float | str) -> Tensor:
    """The larger half of all entries, or the two larger of each four in a row."""
    if isinstance(sparsity, str):
        groups = size.view(len(size), -1, 4)
        return (groups.argsort(-1).argsort(-1) >= 2).view_as(size)
    order = size.flatten().argsort()
    mask = torch.ones_like(size, dtype=torch.bool).flatten()
    mask[order[: round(sparsity * len(order))]] = False
    return mask.view_as(size)


def _weights(model: nn.Module, trained: Trained, structure: str = "kfac") -> Iterator[tuple]:
    """The matrices that every method changes: those of the library's own choice that fit 2:4."""
    chosen = select(model, nn.CrossEntropyLoss(), trained.calibration, layers(trained), False, joint=False)
    parameters = dict(model.named_parameters())
    for matrix in matrices(trained.curvature(structure, "separate"), chosen.names):
        yield matrix, matrix.read(parameters), parameters


def layers(trained: Trained) -> list[str]:
    """Weights whose inputs come in fours; the first convolution of nine inputs stays as it is."""
    return [
        name
        for name, p in trained.model.named_parameters()
        if p.dim() > 1 and p[0].numel() % 4 == 0 and not name.endswith(("symbols.weight", "positions"))
    ]


def compressed(
    function: Callable[..., Compression], trained: Trained, structure: str, bias: str, **what: Any
) -> nn.Module:
    """By :func:`curvature.quantize` or :func:`curvature.prune`, with the curvature that was estimated once."""
    options = {"structure": trained.curvature(structure, bias), "measure": False, "layers": layers(trained)}
    return function(trained.model, nn.CrossEntropyLoss(), trained.calibration, **options, **what).model


def quantised(trained: Trained, bits: float, structure: str = "kfac", bias: str = "separate") -> nn.Module:
    """By :func:`curvature.quantize`."""
    return compressed(quantize, trained, structure, bias, bits=bits)


def pruned(trained: Trained, sparsity: float | str, structure: str = "kfac", bias: str = "separate") -> nn.Module:
    """By :func:`curvature.prune`."""
    return compressed(prune, trained, structure, bias, sparsity=sparsity)


QUANTISERS: dict[str, Callable[[Trained, int], nn.Module]] = {
    "nearest": nearest,
    "GPTQ": lambda t, bits: quantised(t, bits, "foof"),
    "two-sided": lambda t, bits: quantised(t, bits),
    "two-sided, bias": lambda t, bits: quantised(t, bits, bias="joint"),
    "two-sided, bias, allocated": lambda t, bits: quantised(t, bits - 1e-9, bias="joint"),
}
PRUNERS: dict[str, Callable[[Trained, float | str], nn.Module]] = {
    "magnitude": magnitude,
    "SparseGPT": sparse_gpt,
    "inputs": lambda t, s: pruned(t, s, "foof"),
    "two-sided": lambda t, s: pruned(t, s),
    "two-sided, bias": lambda t, s: pruned(t, s, bias="joint"),
}


def measure(seeds: int, models: list[str], bits: tuple[int, ...] = (4, 3, 2)) -> None:
    """Print a row for each model and setting."""
    for name in models:
        rows: dict[tuple[object, str], list[float]] = {}
        start = time.perf_counter()
        accuracies = []
        for seed in range(seeds):
            trained = MODELS[name](seed)
            accuracies.append(trained.accuracy)
            for number in bits:
                for method, quantiser in QUANTISERS.items():
                    rows.setdefault((number, method), []).append(divergence(trained, quantiser(trained, number)))
            for sparsity in (0.5, "2:4"):
                for method, pruner in PRUNERS.items():
                    rows.setdefault((sparsity, method), []).append(divergence(trained, pruner(trained, sparsity)))
        mean = statistics.mean(accuracies)
        print(f"\n{name}: accuracy {mean:.3f}, {seeds} seeds, {time.perf_counter() - start:.0f} s")
        for setting in dict.fromkeys(setting for setting, _ in rows):
            base = rows[setting, "GPTQ" if isinstance(setting, int) else "SparseGPT"]
            for (own, method), values in rows.items():
                if own != setting:
                    continue
                ratios = sorted(v / b for v, b in zip(values, base, strict=True))
                print(
                    f"  {setting!s:5} {method:28} {statistics.median(values):.4f} "
                    f"({min(values):.4f} to {max(values):.4f})  x {statistics.median(ratios):.2f} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


def gptq_layer(W: Tensor, A: Tensor, grid: Grid, block: int = 128) -> Tensor:
    """GPTQ with lazy blocks of columns (Frantar et al. 2022, algorithm 1), for its time."""
    W, out = W.clone(), torch.empty_like(W)
    A = A + 0.01 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(A)), upper=True)
    levels = grid.levels(W)
    for start in range(0, len(A), block):
        stop = min(start + block, len(A))
        errors = torch.empty(len(W), stop - start, dtype=W.dtype)
        for j in range(start, stop):
            out[:, j] = levels.nearest(W[:, j], j)  # type: ignore[arg-type]
            errors[:, j - start] = (W[:, j] - out[:, j]) / U[j, j]
            W[:, j:stop] -= errors[:, j - start, None] * U[j, j:stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return out


def one_layer(size: int, method: str) -> None:
    """Print CPU seconds and peak memory of one layer of this size, above that of its factors; one method a process."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator) / size**0.5
    X, Y = (torch.randn(2 * size, size, generator=generator) for _ in range(2))
    A, B = X.T @ X / (2 * size), Y.T @ Y / (2 * size)
    del X, Y
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if method == "GPTQ":
        gptq_layer(W, A, Grid(fit="range"))
    else:
        left = Dense(B) if method == "two-sided" else Diagonal(torch.ones(size))
        factors = layer_curvature("W", Kronecker(left, Dense(A)), 0.01)
        quantize_matrix(W, factors, Grid(fit="range"), 0, True)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"{size} x {size}  {method:10} {seconds:6.1f} CPU s  {grown:.2f} GiB above the factors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layer", type=int, help="time one layer of this size instead, by --method")
    parser.add_argument("--method", choices=("GPTQ", "inputs", "two-sided"), default="two-sided")
    given = parser.parse_args()
    if given.layer is not None:
        one_layer(given.layer, given.method)
    else:
        measure(given.seeds, given.models)
