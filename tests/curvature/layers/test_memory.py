"""Does memory stay within bounds where a matrix per example and output would not?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

#: 200 outputs, 0.24 M parameters, 64 inputs: gradients of all outputs of all inputs would take 11 GiB in float32.
SCRIPT = """
import sys
import torch
from torch import nn
from curvature import fisher
from tests.peak_memory import peak_kib

torch.set_num_threads(1)
torch.manual_seed(0)
models = {
    "dense": (nn.Sequential(nn.Linear(512, 330), nn.ReLU(), nn.Linear(330, 200)), torch.randn(64, 512)),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 400), nn.ReLU(), nn.Linear(400, 200),
        ),
        torch.randn(64, 3, 16, 16),
    ),
}
model, x = models[sys.argv[1]]
assert 0.23e6 < sum(p.numel() for p in model.parameters()) < 0.25e6
for structure in ("diagonal", "kfac"):
    fisher(model, nn.CrossEntropyLoss(), (x, torch.arange(64)), kind="exact", structure=structure, progress=False)
print(peak_kib())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is counted in KiB on Linux alone")
@pytest.mark.parametrize("model", ["dense", "convolutions"])
def test_exact_statistics_of_many_outputs_fit_in_a_gigabyte(model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    # The whole process, torch itself (0.24 GiB) included.
    assert int(done.stdout) * 1024 < 1e9
