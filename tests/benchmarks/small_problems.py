"""Fourteen small training problems of as many kinds, half of them to choose defaults on and half to confirm them.

Each takes some milliseconds a step. Nothing is prepared in favour of a method: raw tables stay raw, unused rows of
embeddings stay unused. The measure is the loss on the training data (at most 511 examples), in eval mode.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import dis
import inspect
import re
import tokenize
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature.losses import AutogradLoss
from tests.benchmarks.problems import FlatOutput, Transformer

SOURCES = (argparse, ast, difflib, dis, inspect, re, tokenize, typing)


@dataclass
class SmallProblem:
    """A model and how it is trained.

    Attributes:
        model: The model.
        loss_fn: The loss that the loop calls, which layer-based methods are told.
        inputs: Of all examples, ``(N, ...)``.
        targets: Likewise.
        batch_size: Examples in a step.
        steps: Length of a run.
        layerwise: Options that every layer-based method needs here.
        penalty: What the loop adds to the loss, of the model's output.
    """

    model: nn.Module
    loss_fn: Any
    inputs: Tensor
    targets: Tensor
    batch_size: int
    steps: int = 200
    layerwise: dict[str, Any] = field(default_factory=dict)
    penalty: Callable[[Any], Tensor] | None = None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of a batch, as a loop has it."""
        out = self.model(x)
        if self.penalty is not None:
            return self.loss_fn(out[0], y) + self.penalty(out)
        return self.loss_fn(out, y.flatten() if y.dtype == torch.long else y)  # rows of logits for all positions

    @torch.no_grad()
    def measure(self) -> float:
        """The loss on up to 511 training examples, spread over the set."""
        every = max(1, len(self.inputs) // 256)
        self.model.eval()
        value = float(self.loss(self.inputs[::every][:511], self.targets[::every][:511]))
        self.model.train()
        return value

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch; all examples in their order where it is as large."""
        if self.batch_size >= len(self.inputs):
            return self.inputs, self.targets
        rows = torch.randint(len(self.inputs), (self.batch_size,), generator=generator)
        return self.inputs[rows], self.targets[rows]


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers = [part for m, n in pairwise(sizes) for part in (nn.Linear(m, n), activation())]
    return nn.Sequential(*layers[:-1])


@cache
def images() -> tuple[Tensor, Tensor]:
    """1797 digits ``(N, 1, 8, 8)`` in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x[order], torch.tensor(data.target)[order]


@cache
def text(module: ModuleType) -> str:
    """Source of a module of the standard library."""
    return inspect.getsource(module)


@cache
def windows(length: int) -> tuple[Tensor, Tensor]:
    """Pieces of source as symbols below 96 ``(N, length)``, and the symbols that follow."""
    ids = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in "".join(map(text, SOURCES[:4]))])
    pieces = ids.unfold(0, length + 1, length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    return pieces[order, :-1].contiguous(), pieces[order, 1:].contiguous()


# To choose on


def convolutions(seed: int) -> SmallProblem:
    """Two convolutions with batch norm."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    return SmallProblem(model, nn.CrossEntropyLoss(), *images(), 64)


def characters(seed: int) -> SmallProblem:
    """A transformer of one layer on source text."""
    return SmallProblem(FlatOutput(Transformer(depth=1)), nn.CrossEntropyLoss(), *windows(16), 16)


def words(seed: int) -> SmallProblem:
    """Which module a line of source is from, by the mean of its words' embeddings; most rows are unused in a batch."""
    return SmallProblem(BagOfWords(), nn.CrossEntropyLoss(), *lines(), 64)


class BagOfWords(nn.Module):
    """Embeddings of up to 12 words, 0 for none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(1001, 24, mode="mean", padding_idx=0)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, len(SOURCES)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


@cache
def lines() -> tuple[Tensor, Tensor]:
    """Lines of source as words ``(N, 12)`` below 1001, and the places of their modules."""
    found = [(re.findall(r"\w+", line)[:12], place) for place, m in enumerate(SOURCES) for line in text(m).splitlines()]
    found = [(tokens, place) for tokens, place in found if len(tokens) > 2]
    common = Counter(token for tokens, _ in found for token in tokens).most_common(1000)
    index = {token: k + 1 for k, (token, _) in enumerate(common)}
    x = torch.tensor([[index.get(t, 0) for t in tokens] + [0] * (12 - len(tokens)) for tokens, _ in found])
    y = torch.tensor([place for _, place in found])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def diabetes(seed: int) -> SmallProblem:
    """A raw table: ten columns of scales from 0.5 to 200, targets of some hundreds."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    return SmallProblem(perceptron(10, 32, 32, 1), nn.MSELoss(), *tensors(x, y[:, None]), 32)


def factorisation(seed: int) -> SmallProblem:
    """Ratings of 80 users and 60 items, a third of them known, as products of vectors of eight numbers."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 3, generator=generator) for n in (80, 60))
    pairs = torch.randperm(80 * 60, generator=generator)[:1600]
    x = torch.stack([pairs // 60, pairs % 60], 1)
    y = 3 + (left[x[:, 0]] * right[x[:, 1]]).sum(1) + 0.3 * torch.randn(1600, generator=generator)
    return SmallProblem(Factors(80, 60, 8), nn.MSELoss(), x, y, 128)


class Factors(nn.Module):
    """A product of two embeddings, and a bias from each."""

    def __init__(self, users: int, items: int, rank: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, rank), nn.Embedding(items, rank)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, pairs: Tensor) -> Tensor:
        u, i = pairs.unbind(1)
        return (self.users(u) * self.items(i)).sum(1) + (self.user_bias(u) + self.item_bias(i)).squeeze(1)


def picture(seed: int) -> SmallProblem:
    """A picture of 32 x 32 pixels as a function of the place, by sines; all pixels in each step."""
    pieces = images()[0][:16, 0]
    y = pieces.reshape(4, 4, 8, 8).transpose(1, 2).reshape(-1, 1)
    line = torch.linspace(-1, 1, 32)
    x = torch.cartesian_prod(line, line)
    model = nn.Sequential(nn.Linear(2, 32), Sine(), nn.Linear(32, 32), Sine(), nn.Linear(32, 1))
    with torch.no_grad():
        model[0].weight.mul_(2**0.5)
        model[2].weight.mul_(6**0.5 / 10)
    return SmallProblem(model, nn.MSELoss(), x, y, 1024)


class Sine(nn.Module):
    """``sin(10 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return (10 * x).sin()


def variational(seed: int) -> SmallProblem:
    """A variational autoencoder of digits; its divergence is no call of a loss module."""
    x = images()[0].flatten(1)
    return SmallProblem(Variational(), nn.BCEWithLogitsLoss(), x, x, 128, penalty=divergence)


class Variational(nn.Module):
    """Code of eight numbers, with noise in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(64, 48, 16), perceptron(8, 48, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return self.decoder(code), mean, log_variance


def divergence(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KL from the prior, in the units of a mean over 64 pixels."""
    _, mean, log_variance = out
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 64


# To confirm


def residual(seed: int) -> SmallProblem:
    """Two residual blocks with batch norm."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(Residual(12), nn.AvgPool2d(2), Residual(12), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)),
    )
    return SmallProblem(model, nn.CrossEntropyLoss(), *images(), 32)


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        first, second = convolutions
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


def patches(seed: int) -> SmallProblem:
    """A vision transformer on 16 patches."""
    return SmallProblem(VisionTransformer(), nn.CrossEntropyLoss(), *images(), 32)


class VisionTransformer(nn.Module):
    """Patches of 2 x 2, a pre-norm layer of torch's own, mean over the patches."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.layer = nn.TransformerEncoderLayer(width, 3, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.places
        return self.head(self.norm(self.layer(tokens)).mean(1))


def recurrent(seed: int) -> SmallProblem:
    """An LSTM on source text."""
    return SmallProblem(FlatOutput(Recurrent()), nn.CrossEntropyLoss(), *windows(24), 16)


class Recurrent(nn.Module):
    """Embedding, one LSTM, a head."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.symbols, self.lstm = nn.Embedding(96, 24), nn.LSTM(24, width, batch_first=True)
        self.head = nn.Linear(width, 96)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.symbols(ids))[0])


def tumours(seed: int) -> SmallProblem:
    """A table of thirty standardised columns, two classes, dropout, the smallest batches."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return SmallProblem(model, nn.CrossEntropyLoss(), tensors((x - x.mean(0)) / x.std(0))[0], torch.tensor(y), 16)


def graph(seed: int) -> SmallProblem:
    """Communities of a random graph of 200 nodes with noisy features; all nodes in each step."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 4
    same = y[:, None] == y
    edges = (torch.rand(200, 200, generator=generator) < torch.where(same, 0.06, 0.015)).triu(1)
    adjacency = (edges | edges.T).float() + torch.eye(200)
    root = adjacency.sum(1).rsqrt()
    centres, noise = torch.randn(4, 16, generator=generator), torch.randn(200, 16, generator=generator)
    x = centres[y] + 2 * noise
    return SmallProblem(GraphNetwork(root[:, None] * adjacency * root), nn.CrossEntropyLoss(), x, y, 200)


class GraphNetwork(nn.Module):
    """Three graph convolutions."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise((16, 32, 32, 4)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(self.adjacency @ layer(x))
        return self.adjacency @ self.layers[-1](x)


def mixture(seed: int) -> SmallProblem:
    """The density of a function's inverse, with several branches, by a mixture of five Gaussians."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(1024, 1, generator=generator)
    x = y + 0.3 * (2 * torch.pi * y).sin() + 0.05 * torch.randn(1024, 1, generator=generator)
    loss = AutogradLoss(mixture_loss, reduction="mean")
    model = perceptron(1, 32, 32, 15, activation=nn.Tanh)
    return SmallProblem(model, loss, x, y, 128, layerwise={"fisher": "empirical"})  # its Hessian is indefinite


def mixture_loss(out: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of targets ``(N, 1)`` under a mixture ``(N, 3 k)`` of Gaussians."""
    logits, mean, log_scale = out.chunk(3, -1)
    terms = logits.log_softmax(-1) - 0.5 * ((y - mean) / log_scale.exp()).square() - log_scale
    return -terms.logsumexp(-1).mean()


def friedman(seed: int) -> SmallProblem:
    """A raw table: four columns of scales from 1 to 1,000, targets of some hundreds; all rows in each step."""
    from sklearn.datasets import make_friedman2

    x, y = make_friedman2(512, noise=20.0, random_state=0)
    return SmallProblem(perceptron(4, 32, 32, 1, activation=nn.ReLU), nn.MSELoss(), *tensors(x, y[:, None]), 512)


def tensors(*arrays: Any) -> list[Tensor]:
    """In float32."""
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


Make = Callable[[int], SmallProblem]

TUNE: dict[str, Make] = {
    f.__name__: f for f in (convolutions, characters, words, diabetes, factorisation, picture, variational)
}
CONFIRM: dict[str, Make] = {f.__name__: f for f in (residual, patches, recurrent, tumours, graph, mixture, friedman)}
PROBLEMS: dict[str, Make] = TUNE | CONFIRM
