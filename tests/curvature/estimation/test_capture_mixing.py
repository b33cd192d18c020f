"""Training statistics stay unbiased where the leading axis of the inputs is not the examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import curvature
from curvature import DiagonalFisher
from precond import PreconditionedOptimizer
from solvers import Eigh, Tikhonov


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
