"""Does memory stay within bounds where a matrix per example and output would not?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature import fisher
from tests.peak_memory import peak_of_tensors


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 330), nn.ReLU(), nn.Linear(330, 200))


def convolutions() -> nn.Module:
    widths = [(3, 32), (32, 64), (64, 64)]
    blocks = [layer for i, o in widths for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, 400), nn.ReLU(), nn.Linear(400, 200))


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("make,shape", [(dense, (512,)), (convolutions, (3, 16, 16))])
def test_exact_statistics_of_many_outputs_take_little(
    make: type[nn.Module], shape: tuple[int, ...], structure: str
) -> None:
    """200 outputs, 0.24 M parameters: gradients of all outputs of 16 inputs would take 3 GB in float32."""
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(16, *shape), torch.arange(16)
    assert 0.23e6 < sum(p.numel() for p in model.parameters()) < 0.25e6

    def run() -> None:
        fisher(model, nn.CrossEntropyLoss(), (x, y), kind="exact", structure=structure, progress=False)

    assert peak_of_tensors(run) < 50e6
