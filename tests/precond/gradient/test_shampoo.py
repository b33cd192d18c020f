"""Does Shampoo follow its papers: roots, blocks, grafting, corrected eigenvalues, and a failed root?"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from precond.gradient import shampoo
from precond.gradient.matrices import merged_shape
from precond.gradient.shampoo import Shampoo
from solvers import SolverError
from tests.precond import references as ref


@pytest.mark.parametrize("grafting", [None, "sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize("block", [3, 8])
def test_equals_the_reference(grafting, block):
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "grafting": grafting}

    def reference(theta, gradients, **given):
        yield from ref.shampoo(theta, gradients, ema=0.9, floor=1e-3, period=4, block=block, **given)

    def merged(theta, gradients, **given):
        shape = merged_shape(theta.shape, block)
        found = reference(theta.reshape(shape), [g.reshape(shape) for g in gradients], **given)
        return (value.reshape(theta.shape) for value in found)

    def make(model):
        return Shampoo(model.parameters(), damping=1e-3, inverse_update_period=4, block_size=block, **options)

    ref.assert_equals_reference(make, merged, options)


def test_sums_another_exponent_and_a_late_start_equal_the_reference():
    def make(model):
        return Shampoo(
            model.parameters(),
            lr=0.01,
            betas=(0.0, 0.9),
            curvature_ema=1.0,
            damping=1e-6,
            exponent=-0.4,
            grafting="adam",
            inverse_update_period=7,
            start_step=5,
            block_size=3,
        )

    options = {"lr": 0.01, "betas": (0.0, 0.9), "ema": 1, "floor": 1e-6, "eps": 1e-8, "grafting": "adam"}
    ref.assert_equals_reference(make, ref.shampoo, {**options, "period": 7, "block": 3, "start": 5, "exponent": -0.4})


def test_corrected_eigenvalues_equal_the_reference():
    def make(model):
        return Shampoo(
            model.parameters(),
            lr=0.01,
            betas=(0.8, 0.9),
            eps=1e-5,
            grafting=None,
            eigenvalue_correction=True,
            inverse_update_period=4,
            block_size=4,
        )

    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-5, "period": 4}

    def merged(theta, gradients, **given):
        shape = merged_shape(theta.shape, 4)
        found = ref.corrected_shampoo(theta.reshape(shape), [g.reshape(shape) for g in gradients], **given)
        return (value.reshape(theta.shape) for value in found)

    # Vectors have many null directions at first, whose eigenvectors are arbitrary.
    only = ("conv.weight", "hidden.weight", "out.weight", "scale")
    ref.assert_equals_reference(make, merged, options, only=only)


def test_one_step_has_a_closed_form(generator):
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    g = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    p.grad = g.clone()
    Shampoo([p], lr=1.0, grafting=None, damping=1e-4, curvature_ema=1.0).step()
    left = ref.symmetric_power((g @ g.mT).numpy(), -0.25, 1e-4)
    right = ref.symmetric_power((g.mT @ g).numpy(), -0.25, 1e-4)
    np.testing.assert_allclose(p.detach().numpy(), -left @ g.numpy() @ right, rtol=0, atol=1e-12)


def test_a_huge_floor_scales_the_gradient(generator):
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    p.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    Shampoo([p], lr=1.0, grafting=None, damping=1e8).step()
    torch.testing.assert_close(p.detach(), -p.grad / 1e8**0.5, rtol=1e-12, atol=0)


def test_after_a_failure_the_last_root_stays_and_the_fourth_names_the_block(monkeypatch, caplog):
    p = torch.nn.Parameter(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    optimizer = Shampoo([("weight", p)], inverse_update_period=1, block_size=2)

    def step():
        p.grad = torch.ones(4, 2)
        optimizer.step()

    step()
    kept = optimizer.state[p]["1.root.0"].clone()

    def fail(*args):
        raise SolverError("no convergence")

    monkeypatch.setattr(shampoo, "symmetric_power", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step()
    assert "weight, block 1 keeps its last decomposition: no convergence" in caplog.text
    assert torch.equal(optimizer.state[p]["1.root.0"], kept)
    with pytest.raises(SolverError, match=r"weight, block 0: refresh failed 4 times in a row\. no convergence"):
        step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grafting": "adamw"}, "grafting is one of sgd, adagrad, rmsprop, adam, or None; got 'adamw'"),
        ({"damping": 0.0}, "damping must be positive, because factors may be singular"),
        ({"eigenvalue_correction": True, "exponent": -0.5}, "leave exponent out"),
        ({"start_step": 3, "grafting": None}, "start_step=3 needs a grafting method"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Shampoo([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("shape", [(300,), (40, 8), (300, 2)])
def test_rounding_errors_of_directions_without_a_gradient_do_not_move_parameters(shape: tuple[int, ...]) -> None:
    # All entries have the same gradient, so that every factor has rank one and all entries move alike.
    p = nn.Parameter(torch.ones(shape, dtype=torch.float32))
    optimizer = Shampoo([p], lr=0.03)
    p.square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full(shape, 0.97), rtol=0, atol=1e-4)


def test_a_block_without_factors_takes_the_step_of_adam() -> None:
    start = torch.linspace(-1, 1, 2000, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Shampoo([p], lr=0.01, betas=(0.9, 0.999), block_size=4096)
    adam = torch.optim.Adam([q], lr=0.01, betas=(0.9, 0.999))
    for optimizer, x in ((mine, p), (adam, q)):
        for _ in range(3):
            optimizer.zero_grad()
            (x - 3).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
