"""Does SPlus take bounded steps in the eigenbasis, and evaluate the average of its iterates?"""

from __future__ import annotations

import pytest
import torch

from precond.gradient.splus import SPlus
from tests.precond import references as ref


@pytest.mark.parametrize("period", [1, 6])
def test_equals_the_reference(period):
    options = {"lr": 0.05, "betas": (0.9, 0.8), "vector_scale": 0.1}

    def make(model):
        return SPlus(model.parameters(), inverse_update_period=period, **options)

    # With one channel no factor has more than one null direction, so that its eigenvectors are determined.
    ref.assert_equals_reference(make, ref.splus, {**options, "period": period}, channels=1)


def test_averages_are_debiased_and_applied_for_a_while():
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = SPlus([p], average_decay=0.9)
    iterates = []
    for step in range(4):
        p.grad = torch.arange(6.0, dtype=torch.float64).reshape(3, 2) - step
        optimizer.step()
        iterates.append(p.detach().clone())
    weights = [0.9 ** (3 - i) for i in range(4)]
    expected = sum(w * x for w, x in zip(weights, iterates, strict=True)) / sum(weights)
    with optimizer.averaged():
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)
    assert torch.equal(p.detach(), iterates[-1])


def test_own_values_come_back_after_an_exception():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = SPlus([p])
    p.grad = torch.eye(2)
    optimizer.step()
    p.data.add_(1)
    own = p.detach().clone()
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert torch.equal(p.detach(), own)


def test_refuses_a_decay_of_one():
    with pytest.raises(ValueError, match="average_decay is the weight of the old average"):
        SPlus([torch.nn.Parameter(torch.ones(2))], average_decay=1.0)
