"""The page of what is supported is what the code supports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import curvature
from curvature.cli import support
from curvature.layers import MODULES
from curvature.structures.blocks import BLOCKS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "support.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(f"\n{support.RUN}\n")[0] == support.markdown(), (
        f"put what {Path(sys.executable).name} -m curvature.cli.support prints above '{support.RUN}' in docs/support.md"
    )


@pytest.mark.parametrize("structure", list(BLOCKS))
def test_the_table_says_what_is_estimated(structure: str) -> None:
    """A layer, a norm and a bare parameter, as a recorded pass finds them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.scale = nn.Conv1d(2, 3, 2), nn.GroupNorm(1, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.norm(self.conv(x)).mean(-1)

    data = (torch.randn(4, 2, 5), torch.randint(3, (4,)))
    table = curvature.coverage(Model(), nn.CrossEntropyLoss(), data, curvature=BLOCKS[structure]())
    column = list(BLOCKS).index(structure)
    assert table["conv.weight"].structure == support.estimates((3, 4), 1, "outer")[column]
    assert table["norm.weight"].structure == support.estimates((3, 1), 2, "per_sample")[column]
    assert table["scale"].structure == support.estimates((3,), 1, "per_sample")[column]


def test_every_layer_is_in_the_page() -> None:
    page = support.markdown()
    shown = {m.__name__ for m in MODULES if getattr(nn, m.__name__, None) is m}
    assert {"Linear", "Conv2d", "LSTM", "Embedding", "LayerNorm"} <= shown
    assert all(name in page for name in shown)
