"""Does KL-Shampoo follow its paper, and does its fixed point minimise the KL divergence?"""

from __future__ import annotations

import pytest
import torch

from precond.gradient.kl_shampoo import KLShampoo
from tests.precond import references as ref


@pytest.mark.parametrize("period", [1, 4])
def test_equals_the_reference(period):
    options = {"lr": 0.02, "betas": (0.9, 0.8), "eps": 1e-6}

    def make(model):
        return KLShampoo(model.parameters(), inverse_update_period=period, **options)

    ref.assert_equals_reference(make, ref.kl_shampoo, {**options, "period": period})


def test_a_constant_gradient_is_whitened_on_both_sides(generator):
    # At the fixed point S_a = G S_b^-1 G^T / n, so that D = S_a^-1/2 G S_b^-1/2 has D D^T = n I.
    p = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer = KLShampoo([p], lr=1.0, betas=(0.0, 0.9), inverse_update_period=1)
    g = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    for _ in range(300):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
    direction = before - p.detach()
    torch.testing.assert_close(direction @ direction.mT, 3 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_scaled_gradient_gives_the_same_direction(generator):
    gradients = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(5)]

    def trained(scale):
        p = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = KLShampoo([p])
        for g in gradients:
            p.grad = g * scale
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(trained(1e-6), trained(1.0), rtol=1e-9, atol=0)


def test_a_gradient_of_zero_before_the_first_real_one_is_no_harm(generator):
    p = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = KLShampoo([p])
    for scale in (0.0, 0.0, 1.0):
        p.grad = torch.randn(4, 3, generator=generator) * scale
        optimizer.step()
    assert torch.isfinite(p).all()
    assert 0 < p.abs().max() < 0.1
