"""Does KL-Shampoo follow its paper, and does its fixed point minimise the KL divergence?"""

from __future__ import annotations

import pytest
import torch

from precond.gradient.kl_shampoo import KLShampoo
from tests.precond import references as ref


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("period", [1, 4])
def test_equals_the_reference(period, warm):
    options = {"lr": 0.02, "betas": (0.9, 0.8), "eps": 1e-6}

    def make(model):
        return KLShampoo(model.parameters(), inverse_update_period=period, warm_average=warm, **options)

    ref.assert_equals_reference(make, ref.kl_shampoo, {**options, "period": period, "warm": warm})


def test_the_identity_counts_as_one_gradient():
    # Of one entry: t gradients and the first one's square once more, in both factors together.
    p = torch.nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    optimizer = KLShampoo([p], betas=(0.0, 0.99), eps=0.0)
    gradients = [torch.tensor([[a, 0.0]], dtype=torch.float64) for a in (2.0, 3.0, 5.0)]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    first = gradients[0].square().mean()
    expected = (first * torch.eye(2) + sum(g.mT @ g for g in gradients)) / 4
    torch.testing.assert_close(optimizer.state[p]["factor.1"], expected.double())


def test_a_state_from_before_goes_on_with_its_average():
    p = torch.nn.Parameter(torch.ones(3, 2))
    old = KLShampoo([p], warm_average=False)
    p.grad = torch.ones(3, 2)
    old.step()
    saved = old.state_dict()
    del saved["param_groups"][0]["warm_average"]
    new = KLShampoo([p])
    new.load_state_dict(saved)
    assert new.param_groups[0]["warm_average"] is False


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
