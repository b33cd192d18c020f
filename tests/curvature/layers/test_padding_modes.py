"""Padding that is not zeros is seen: the diagonal is that of the convolution on the padded input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvature


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_diagonal_of_a_padded_convolution(mode: str, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    model = model.double()
    x, y = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    reference = [torch.zeros_like(p) for p in model.parameters()]
    for n in range(3):
        z = model(x[n : n + 1])[0]
        p = z.softmax(0).detach()
        root = p.sqrt() * (torch.eye(3, dtype=p.dtype) - p.unsqueeze(1))  # columns sqrt(p_c) (e_c - p)
        onehot = torch.eye(3, dtype=p.dtype)[y[n]]
        signals = root.unbind(1) if kind == "exact" else [p - onehot]
        for signal in signals:
            gradients = torch.autograd.grad(z, list(model.parameters()), signal, retain_graph=True)
            for total, gradient in zip(reference, gradients, strict=True):
                total += gradient.square() / 3
    found = curvature.fisher(model, nn.CrossEntropyLoss(), (x, y), kind=kind, structure="diagonal")  # type: ignore[arg-type]
    torch.testing.assert_close(
        found.diagonal(), torch.cat([total.reshape(-1) for total in reference]), rtol=1e-10, atol=1e-14
    )
