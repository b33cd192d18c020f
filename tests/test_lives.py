"""The pages on the life of a step and of a GGN name what is called, in the order in which it is."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn

import curvature
from precond import KFAC, SOAP, LevenbergMarquardt, Newton
from precond.layerwise.blocks import rows as rows_of_layers

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = ROOT / "docs" / "concepts"
WHO = re.compile(r"\[`([\w.]+)`\]\(\.\./\.\./([\w/]+)\.py\)")


def code_of(qualified: str, file: str) -> CodeType:
    """The code of a function, from its name within a module and the file of the module."""
    value: Any = importlib.import_module(file.replace("/", "."))
    for part in qualified.split("."):
        value = inspect.getattr_static(value, part)
    value = getattr(value, "__func__", value)
    code = inspect.unwrap(value).__code__
    assert isinstance(code, CodeType)
    return code


def rows(page: str, *tables: int) -> list[tuple[str, str]]:
    """Name and file of the first link of each row, from some tables of a page, counted from 0."""
    every = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    found = [every[i] for i in tables]
    matches = [WHO.search(line) for table in found for line in table.splitlines()[2:]]
    return [(match[1], match[2]) for match in matches if match is not None]


def codes_of(page: str, *tables: int) -> list[CodeType]:
    return [code_of(*row) for row in rows((CONCEPTS / page).read_text(encoding="utf-8"), *tables)]


def order(run: Callable[[], Any], codes: list[CodeType]) -> list[CodeType]:
    """These codes in the order of their first calls."""
    called: list[CodeType] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in codes and frame.f_code not in called:
            called.append(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return called


def names(codes: list[CodeType]) -> list[str]:
    return [code.co_qualname for code in codes]


def test_a_step_is_as_its_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of_layers, "WORTH", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, momentum=0.9, weight_decay=1e-2, kl_clip=1e-2, curvature_update_period=1)
    x, y = torch.randn(6, 24), torch.randint(24, (6,))

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    step()  # the first one has no inverses and no rows yet
    codes = codes_of("life-of-a-step.md", 0)
    assert names(order(step, codes)) == names(codes)
    optimizer.detach()


def test_a_step_from_gradients_alone_is_as_its_page_says() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = SOAP(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().mean().backward()
    codes = codes_of("life-of-a-step.md", 2)
    assert names(order(optimizer.step, codes)) == names(codes)


def test_a_step_with_a_closure_is_as_its_page_says() -> None:
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    optimizer = Newton(model.parameters(), damping_rule=LevenbergMarquardt())
    codes = codes_of("life-of-a-step.md", 3)
    assert names(order(lambda: optimizer.step(lambda: model(x).exp().mean()), codes)) == names(codes)


def test_a_ggn_is_as_its_page_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]

    def run() -> None:
        curvature.ggn(model, nn.CrossEntropyLoss(), data, structure="kfac").inverse(damping=1e-2)

    codes = codes_of("life-of-a-ggn.md", 0, 1)
    assert names(order(run, codes)) == names(codes)


@pytest.mark.parametrize("page", ["life-of-a-step.md", "life-of-a-ggn.md"])
def test_every_name_of_the_page_is_in_the_file_it_links(page: str) -> None:
    for name, file in WHO.findall((CONCEPTS / page).read_text(encoding="utf-8")):
        value: Any = importlib.import_module(file.replace("/", "."))
        for part in name.split("."):
            value = inspect.getattr_static(value, part)


def test_the_order_of_calls_is_seen() -> None:
    def first() -> None: ...
    def second() -> None:
        first()

    codes = [first.__code__, second.__code__]
    assert names(order(second, codes)) == [second.__qualname__, first.__qualname__]
    assert rows("| a | b |\n| --- | --- |\n| x | [`A.b`](../../c/d.py) |\n| y | |\n", 0) == [("A.b", "c/d")]
