"""The page of methods is what the code says, and the stated operations of a step are what a step does."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from precond import methods, taxonomy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "methods.md"
M, N, ROWS = 12, 20, 64
METHODS = {method.name: method for method in methods()}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == taxonomy.markdown(), (
        f"run {Path(sys.executable).name} -m precond.taxonomy > docs/reference/methods.md"
    )


def stated(name: str) -> int:
    """The formula of a step, evaluated."""
    formula = METHODS[name].step.partition(" for ")[0]
    for pattern, python in (("²", "**2"), ("³", "**3"), (r"(\d)([mn(])", r"\1*\2"), (r"([mn](?:\*\*\d)?)n", r"\1*n")):
        formula = re.sub(pattern, python, formula)
    return int(eval(formula, {"m": M, "n": N}))


def counted(name: str, **options: Any) -> list[int]:
    """Floating-point operations in matrix products of each step, after the first two."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(N, M, bias=False), nn.MSELoss()
    method = METHODS[name]
    given = (model, loss_fn) if method.needs == "layers" else (model.parameters(),)
    optimizer: Any = method.cls(*given, lr=1e-3, **options)
    out = []
    for _ in range(8):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(ROWS, N)), torch.randn(ROWS, M)).backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        out.append(counter.get_total_flops())
    return out[2:]


@pytest.mark.parametrize("name", ["KLShampoo", "Muon", "PSGD", "SOAP", "SPlus", "Shampoo"])
def test_a_step_from_gradients_costs_what_is_stated(name: str) -> None:
    options = {"precision": "bfloat16"} if name == "Muon" else {}  # wide matrices in full precision cost less
    assert min(counted(name, **options)) == stated(name)


def test_a_step_of_soap_muon_between_two_refreshes_costs_what_is_stated() -> None:
    assert min(counted("SOAPMuon", inverse_update_period=5, precision="bfloat16")) == stated("SOAPMuon")


@pytest.mark.parametrize("name", ["EKFAC", "KFAC", "SINGD", "TNT"])
def test_a_step_between_two_refreshes_costs_what_is_stated(name: str) -> None:
    assert min(counted(name, damping=1.0, curvature_update_period=5)) == stated(name)
