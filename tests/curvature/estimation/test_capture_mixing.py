"""Training statistics stay unbiased where the leading axis of the inputs is not the examples."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import curvature
from curvature import DiagonalFisher
from curvature.estimation import step_collector
from precond import PreconditionedOptimizer
from solvers import Eigh, Tikhonov
from tests.curvature.loops import step, watching


class TimeMajor(nn.Module):
    """An encoder on (time, batch, d) inputs, pooled over time."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(0))


def test_sampled_diagonals_of_a_time_major_model_are_unbiased() -> None:
    torch.manual_seed(0)
    model, loss_fn = TimeMajor().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 5, 4, dtype=torch.float64), torch.randint(3, (5,))
    exact = curvature.fisher(model, loss_fn, (x, y), kind="exact", structure="diagonal")
    optimizer = PreconditionedOptimizer(
        model, loss_fn, curvature=DiagonalFisher("mc"), damping=Tikhonov(1.0), solver=Eigh(), lr=0.0, curvature_ema=0.0
    )
    draws = []
    for _ in range(400):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.precondition()
        draws.append({n: p.estimator.operator().trace() for n, p in optimizer.preconditioners.items()})
    for block, place in zip(exact.blocks, exact.places, strict=True):  # type: ignore[attr-defined]
        values = torch.stack([draw[place.block.name] for draw in draws])
        stderr = values.std() / len(draws) ** 0.5
        assert (values.mean() - block.trace()).abs() < 4 * stderr
        assert stderr < 0.2 * block.trace()


class Recurrent(nn.Module):
    """A recurrent layer, fused in training, on packed or time-major sequences, and a head on its last states."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed, self.inner = packed, nn.Linear(2, 2)
        self.recurrent, self.head = (nn.LSTM if packed else nn.GRU)(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            packed = pack_padded_sequence(x, [4, 2, 1], batch_first=True, enforce_sorted=True)
            rows = PackedSequence(self.inner(packed.data).tanh(), packed.batch_sizes)
            return self.head(self.recurrent(rows)[1][0][0])
        return self.head(self.recurrent(self.inner(x).transpose(0, 1))[1][0])


def diagonals(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    """By definition: a backward pass for every number of the output."""
    z, parameters = model(x), dict(model.named_parameters())
    out = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row, target in zip(z, y, strict=True):
        p = row.softmax(-1).detach()
        H = p.diag() - p.outer(p) if kind == "exact" else (p - torch.eye(3)[target]).outer(p - torch.eye(3)[target])
        rows = [torch.autograd.grad(number, list(parameters.values()), retain_graph=True) for number in row]
        for name, *g in zip(parameters, *rows, strict=True):
            out[name] += torch.einsum("c...,d...,cd->...", torch.stack(g), torch.stack(g), H) / len(z)
    return out


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed LSTM", "time-major GRU"])
def test_the_mean_over_all_random_signs_is_exact(packed: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, loss_fn = Recurrent(packed).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(3, 4, 2, dtype=torch.float64), torch.tensor([0, 2, 1])
    monkeypatch.setattr(step_collector, "FEW", 0)
    found: list[dict[str, Tensor]] = []
    for bits in product([0, 1], repeat=3):
        pattern = torch.tensor(bits)
        monkeypatch.setattr(step_collector.torch, "randint", lambda *args, pattern=pattern, **options: pattern)
        optimizer = watching(model, loss_fn, "diagonal", kind, curvature_ema=0.0)
        step(optimizer, [lambda: loss_fn(model(x), y)])
        found.append({name: torch.zeros_like(p) for name, p in model.named_parameters()})
        for preconditioner in optimizer.preconditioners.values():
            estimator = preconditioner.estimator
            estimator.block.write(estimator.operator().to_dense().diagonal().reshape(estimator.block.shape), found[-1])
        optimizer.detach()
    for name, expected in diagonals(model, x, y, kind).items():
        values = torch.stack([one[name] for one in found])
        torch.testing.assert_close(values.mean(0), expected, rtol=1e-10, atol=1e-14)
        if name.startswith("recurrent."):  # signs were drawn
            assert (values - expected).abs().max() > 0.01 * expected.max()
