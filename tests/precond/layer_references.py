"""Models and naive float64 derivatives for the methods that look at layers, one example at a time by torch.func."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Layers of several kinds: linear at one position and at three, a norm, a bare scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.out = nn.Linear(3, 3)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.inner(x.unflatten(-1, (3, 2)))))  # (n, 3 positions, 3)
        return self.temperature * self.out(h.mean(-2))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def batches(steps: int, n: int = 12, features: int = 6, classes: int = 3) -> list[Batch]:
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(n, features, dtype=torch.float64, generator=generator)
        found.append((x, torch.randint(0, classes, (n,), generator=generator)))
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch], loss_fn: nn.Module) -> None:
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def assert_resumes(
    make: Callable[[nn.Module], torch.optim.Optimizer], data: list[Batch], loss_fn: nn.Module, stop: int
) -> None:
    """A run that is saved after some batches, loaded into another model and gone on with, ends bit for bit alike."""
    whole = net()
    train(whole, make(whole), data, loss_fn)
    first = net()
    optimizer = make(first)
    train(first, optimizer, data[:stop], loss_fn)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = net(seed=1)
    again = make(second)
    second.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(second, again, data[stop:], loss_fn)
    assert torch.equal(flat(second.parameters()), flat(whole.parameters()))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def spans(model: nn.Module) -> dict[str, slice]:
    """Where each parameter is in the flat vector."""
    found, start = {}, 0
    for name, p in model.named_parameters():
        found[name] = slice(start, start + p.numel())
        start += p.numel()
    return found


def rows(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Gradients ``(m, P)`` whose outer products, divided by the batch, are the Fisher of a mean cross-entropy."""
    model = copy.deepcopy(model)  # an optimizer may be watching it
    params = {name: p.detach() for name, p in model.named_parameters()}

    def back(values: dict[str, Tensor], one: Tensor, v: Tensor) -> Tensor:
        return (functional_call(model, values, (one.unsqueeze(0),))[0] * v).sum()

    p = model(x).detach().softmax(-1)
    unit = torch.eye(p.shape[1], dtype=p.dtype)
    signals = (
        [p - unit[y]] if kind == "empirical" else [p[:, c : c + 1].sqrt() * (unit[c] - p) for c in range(len(unit))]
    )
    found = []
    for signal in signals:
        per_sample = vmap(grad(back), (None, 0, 0))(params, x, signal)
        found.append(torch.cat([g.reshape(len(x), -1) for g in per_sample.values()], 1))
    return torch.cat(found)


def walk(
    model: nn.Module, data: list[Batch], loss_fn: nn.Module, direction: Callable[..., Tensor], lr: float
) -> Iterator:
    """Move the model by ``-lr * direction(step, gradient, x, y)`` on the flat vector; yields it after each step."""
    where = spans(model)
    for step, (x, y) in enumerate(data):
        gradient = flat(torch.autograd.grad(loss_fn(model(x), y), list(model.parameters())))
        d = direction(step, gradient, x, y)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * d[where[name]].reshape(p.shape)
        yield flat(model.parameters())


def assert_follows(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    expected: Iterator,
    data: list[Batch],
    loss_fn: nn.Module,
    tolerance: float = 1e-9,
) -> None:
    """Train step by step and compare with the flat vectors expected, which must move."""
    start = flat(model.parameters())
    for step, (pair, reference) in enumerate(zip(data, expected, strict=True)):
        train(model, optimizer, [pair], loss_fn)
        error = (flat(model.parameters()) - reference).abs().max().item()
        assert error < tolerance, f"{error:.1e} off after step {step + 1}"
    assert (flat(model.parameters()) - start).abs().max() > 1e-2, "nothing moved"
