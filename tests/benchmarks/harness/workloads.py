"""Models and batches of random numbers, the same for every entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Workload:
    """A model, its loss (a mean) and one batch; ``tokens``: outputs are (batch, sequence, classes)."""

    name: str
    model: nn.Module
    loss_fn: nn.Module
    x: Tensor
    y: Tensor
    tokens: bool = False

    def flat(self, out: Tensor) -> Tensor:
        return out.flatten(0, 1) if self.tokens else out

    @property
    def flat_y(self) -> Tensor:
        return self.y.flatten() if self.tokens else self.y

    def loss(self) -> Tensor:
        loss: Tensor = self.loss_fn(self.flat(self.model(self.x)), self.flat_y)
        return loss

    @property
    def terms(self) -> int:
        return self.y.numel() if self.tokens else len(self.x)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())


class Attention(nn.Module):
    """Of plain products: the fused kernel has no second derivative, and other libraries need one."""

    def __init__(self, d: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (m(x).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = q @ k.mT * (d // self.heads) ** -0.5
        if self.causal:
            a = a.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((a.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, heads, causal)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class ViT(nn.Module):
    """Patches of 4 x 4 x 3 of images of 32 x 32."""

    def __init__(self, d: int = 192, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Linear(48, d)
        self.pos = nn.Parameter(0.02 * torch.randn(1, 64, d))
        self.blocks = nn.Sequential(*(Block(d, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x) + self.pos)).mean(1))


class GPT(nn.Module):
    def __init__(self, vocab: int = 96, d: int = 128, depth: int = 4, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(Block(d, heads, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]).expand(ids.shape))
        return self.head(self.norm(self.blocks(x)))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    channels = [layer for a, b in pairwise((3, 32, 64, 64)) for layer in _convolution(a, b)]
    return nn.Sequential(*channels, nn.Flatten(), nn.Linear(1024, 10))


def _convolution(a: int, b: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)


def _classes(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    return model, torch.randn(shape), torch.randint(10, shape[:1])


def _text(model: nn.Module, n: int, length: int) -> tuple[nn.Module, Tensor, Tensor]:
    ids = torch.randint(96, (n, length + 1))
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "mlp": lambda: _classes(mlp(784, 1000, 500, 250, 10), 128, 784),
    "cnn": lambda: _classes(cnn(), 64, 3, 32, 32),
    "vit": lambda: _classes(ViT(), 16, 64, 48),
    "gpt": lambda: _text(GPT(), 16, 64),
    # Small ones, for dense matrices, spectra and tests.
    "mlp-small": lambda: _classes(mlp(64, 100, 50, 10), 128, 64),
    "mlp-tiny": lambda: _classes(mlp(20, 32, 24, 10), 64, 20),
}


def make(name: str) -> Workload:
    """A workload, anew and always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = BUILDERS[name]()
    return Workload(name, model, nn.CrossEntropyLoss(), x, y, tokens=name == "gpt")


def epoch_data(w: Workload, n: int) -> tuple[Tensor, Tensor]:
    """n examples of a workload's kind."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((n, *w.x.shape[1:]), generator=generator)
    return x, torch.randint(10, (n,), generator=generator)
