"""Training problems that need no download: an autoencoder of digits, and a language model of source code."""

from __future__ import annotations

import argparse
import ast
import dis
import inspect
import math
import tokenize
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass
class Problem:
    """A model and its data.

    Attributes:
        name: In tables.
        model: What is trained.
        loss_fn: Its loss.
        inputs: All training inputs.
        targets: All training targets.
        measure: What is reported, of the model as it is.
        batch_size: Examples of a step.
        generator: Of the batches.
    """

    name: str
    model: nn.Module
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor
    measure: Callable[[], float]
    batch_size: int
    generator: torch.Generator

    def batch(self) -> tuple[Tensor, Tensor]:
        """Drawn with replacement, the same for every method with the same seed."""
        rows = torch.randint(len(self.inputs), (self.batch_size,), generator=self.generator)
        return self.inputs[rows], self.targets[rows]


def autoencoder(seed: int, batch_size: int = 512, logits: bool = False) -> Problem:
    """Digits of 8 x 8 pixels through six numbers, 64-128-64-32-12-6 and back, tanh; 1500 to train on, 297 held out.

    The measure is the squared error of an image, summed over pixels with values in [0, 1], averaged over the training
    images; the mean image has 4.7. The loss is the same divided by the 64 pixels, or, with ``logits``, the cross
    entropy of each pixel, as Martens and Grosse (2015) and Hinton and Salakhutdinov (2006) train theirs.
    """
    train, _ = digits()
    sizes = [64, 128, 64, 32, 12, 6, 12, 32, 64, 128, 64]
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index not in (4, len(sizes) - 2):  # code and output are linear
            layers.append(nn.Tanh())
    model = nn.Sequential(*layers)
    return Problem(
        "autoencoder",
        model,
        nn.BCEWithLogitsLoss() if logits else nn.MSELoss(),
        train,
        train,
        lambda: squared_error(model, train, logits),
        batch_size,
        torch.Generator().manual_seed(seed),
    )


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out images ``(N, 64)``."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:1500]], images[order[1500:]]


@torch.no_grad()
def squared_error(model: nn.Module, images: Tensor, logits: bool = False) -> float:
    """Of an image, summed over its pixels."""
    found = model(images)
    return float(((found.sigmoid() if logits else found) - images).square().sum(1).mean())


CONTEXT = 16


def language_model(seed: int, batch_size: int = 32) -> Problem:
    """The next of 96 characters in the source of the standard library, by a transformer of two layers of 32 numbers.

    The measure is the cross entropy, in nats, on 64 fixed windows of the training text.
    """
    source = "".join(inspect.getsource(module) for module in (argparse, ast, dis, tokenize, typing))
    ids = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in source])
    windows = ids.unfold(0, CONTEXT + 1, CONTEXT)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    torch.manual_seed(seed)
    model = Transformer()
    loss_fn = nn.CrossEntropyLoss()
    fixed = torch.randint(len(inputs), (64,), generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def measure() -> float:
        return float(nn.functional.cross_entropy(model(inputs[fixed]).transpose(1, 2), targets[fixed]))

    generator = torch.Generator().manual_seed(seed)
    return Problem("language model", FlatOutput(model), loss_fn, inputs, targets, measure, batch_size, generator)


class FlatOutput(nn.Module):
    """Logits of all positions as rows, as ``CrossEntropyLoss`` wants them beside ``targets.flatten()``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).flatten(0, 1)


class Transformer(nn.Module):
    """Pre-norm, causal, with learned positions and a head of its own."""

    def __init__(self, symbols: int = 96, width: int = 32, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        nn.init.normal_(self.symbols.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.symbols(ids) + self.positions)))


class Block(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("future", torch.full((CONTEXT, CONTEXT), -math.inf).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # In full, because the fused kernels have no second derivatives.
        weights = (q @ k.mT / math.sqrt(d // self.heads) + self.future[:s, :s]).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, s, d))
        return x + self.mlp(self.norm_2(x))


PROBLEMS: dict[str, Callable[[int], Problem]] = {"autoencoder": autoencoder, "language model": language_model}
