"""Copies and pickles of an optimizer of layers, taken at any moment of its loop, go on as the original does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.injection import METHODS, Run

LAYERED = sorted(name for name, method in METHODS.items() if method.needs == "layers")
CASES = [(name, {}) for name in LAYERED] + [("EKFAC", {"fisher": "exact"}), ("KFAC", {"fisher": "empirical"})]


def go_on(run: Run, optimizer: Any, loss_fn: Any, step: int) -> list[Tensor]:
    run.optimizer, run.model, run.loss_fn = optimizer, optimizer.model, loss_fn
    run.backward(step)
    optimizer.step()
    return [p.detach().clone() for p in optimizer.model.parameters()]


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_copy_taken_at_any_moment_goes_on_as_the_original(name: str, options: dict[str, Any], kind: str) -> None:
    copied = copy.deepcopy if kind == "deepcopy" else lambda one: pickle.loads(pickle.dumps(one))
    run = Run(name, options=options)
    first, loss_fn = run.optimizer, run.loss_fn
    for step in (0, 4) if name == "EKFAC" else (0,):  # the first one has no inverses yet, and no basis
        copies = []
        first.zero_grad()
        for part in range(2):  # a pass that waits, beside one whose gradient stands
            loss = run.loss(step + part) / 2
            if part:
                copies.append(copied(first))
            loss.backward()
        copies.append(copied(first))
        expected = go_on(run, first, loss_fn, step + 2)
        for one in copies:
            assert all(p.grad is None for p in one.model.parameters())
            found = go_on(run, one, one.loss_fn, step + 2)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        after = copied(first)
        expected = go_on(run, first, loss_fn, step + 3)
        torch.testing.assert_close(go_on(run, after, after.loss_fn, step + 3), expected, rtol=1e-9, atol=1e-12)
        run.optimizer, run.model, run.loss_fn = first, first.model, loss_fn
