"""Does the table of models that were run hold: a part of it run again, and the page's own words?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curvature.matrices.full import GaussNewtonOperator
from tests.benchmarks import support_table
from tests.benchmarks.support_models import MODELS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("### Families of models and losses")[2]
#: One of each kind: the rest runs by hand, in two minutes.
QUICK = (
    "CrossEntropyLoss, class weights",
    "BCELoss",
    "KLDivLoss",
    "a penalty of weights in the loss",
    "MobileNet block: depthwise separable, expanded",
    "U-Net, a class for each pixel",
    "bags of embeddings (EmbeddingBag)",
    "graph attention (GAT)",
    "PINN: residual of Poisson's equation, by derivatives in forward",
    "radial basis functions (cdist)",
    "GRU",
    "the best one, examples routed by an index",
    "S4D: complex poles, convolution by FFT",
    "members along an axis (bmm)",
    "affine coupling (RealNVP)",
    "variational, sampling in forward",
    "traced (torch.jit)",
)


def page_row(name: str) -> list[str]:
    """The cells of a row of the page, with the messages in place of their numbers."""
    notes = dict(line.split(". ", 1) for line in TABLE.splitlines() if line[:1].isdigit())
    (line,) = [line for line in TABLE.splitlines() if line.startswith(f"| {name} |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    return [f"{c[: c.index(' (')]}: {notes[c[c.index('(') + 1 : -1]]}" if c.endswith(")") else c for c in cells]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_a_row_of_the_page_comes_out_again(name: str) -> None:
    ((_, make),) = [(key, make) for key, make in MODELS.items() if key[1] == name]
    assert list(support_table.cells(make()).values()) == page_row(name)


def test_the_page_has_every_row_and_nothing_wrong() -> None:
    rows = [name for _, name in MODELS]
    shown = [line.split(" | ")[0][2:] for line in TABLE.splitlines() if line.startswith("| ")]
    assert [name for name in shown if name in rows] == rows
    assert len(rows) >= 100
    assert "WRONG" not in TABLE and "ERROR" not in TABLE


@pytest.mark.filterwarnings("ignore")
def test_the_table_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = MODELS["losses", "MSELoss"]()
    products = GaussNewtonOperator.apply
    monkeypatch.setattr(GaussNewtonOperator, "apply", lambda self, x: products(self, x) * (1 + 1e-7))
    row = support_table.cells(case)
    assert {name for name, found in row.items() if found.startswith("WRONG: 1.0e-07")} == {"GGN", "Fisher", "empirical"}

    def broken(self: GaussNewtonOperator, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not for users")

    monkeypatch.setattr(GaussNewtonOperator, "apply", broken)
    assert support_table.cells(case)["GGN"].startswith("ERROR: AssertionError: not for users")
