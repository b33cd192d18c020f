"""Is the Hessian of generalized linear models the dense one, and is every other loss left to the general way?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from precond.closure.affine import affine_hessian
from precond.closure.newton import Newton

N, D, C = 7, 4, 3


def problem(bias=True):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return nn.Linear(D, C, bias=bias, dtype=torch.float64), x, torch.randint(C, (N,), generator=generator)


def dense(loss, params):
    """Every second derivative, one at a time."""
    slopes = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True)
    rows = []
    for slope, p in zip(slopes, params, strict=True):
        for entry in (torch.zeros_like(p) if slope is None else slope).reshape(-1):
            found = (None,) * len(params)
            if entry.requires_grad:
                found = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(q) if f is None else f for f, q in zip(found, params, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def logistic(model, x, y):
    return F.cross_entropy(model(x), y)


def ridge(model, x, y):
    return F.cross_entropy(model(x), y, reduction="sum") + 0.1 * sum(p.square().sum() for p in model.parameters())


def quartic_penalty(model, x, y):
    return F.cross_entropy(model(x), y) + model.weight.pow(4).sum() + (model.weight[:, 0] * model.weight[:, 1]).sum()


def poisson(model, x, y):
    return F.poisson_nll_loss(model(x)[:, 0], y.double())


def sequences(model, x, y):
    return F.cross_entropy(model(x[:6].view(2, 3, D)).flatten(0, 1), y[:6])


@pytest.mark.parametrize("loss", [logistic, ridge, quartic_penalty, poisson, sequences])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flipped", [False, True])
def test_equals_every_second_derivative(loss, bias, flipped):
    model, x, y = problem(bias)
    params = list(model.parameters())[:: -1 if flipped else 1]

    def closure():
        return loss(model, x, y)

    found = affine_hessian(closure, params, closure().detach())
    assert found is not None
    torch.testing.assert_close(found, dense(closure, params), rtol=1e-10, atol=1e-12)


def test_a_frozen_bias_is_a_constant():
    model, x, y = problem()
    model.bias.requires_grad_(False)

    def closure():
        return logistic(model, x, y)

    # The bias is no parameter here, so the map is not recognised, and the general way serves it.
    assert affine_hessian(closure, [model.weight], closure().detach()) is None
    optimizer, before = Newton(model.parameters(), damping=0.1), model.weight.detach().clone().reshape(-1)
    step = torch.linalg.solve(
        dense(closure, [model.weight]) + 0.1 * torch.eye(C * D, dtype=torch.float64),
        torch.autograd.grad(closure(), model.weight)[0].reshape(-1),
    )
    optimizer.step(closure)
    torch.testing.assert_close(model.weight.detach().reshape(-1), before - step, rtol=0, atol=1e-10)


def rows_interact(model, x, y):
    z = model(x)
    return F.cross_entropy(z - z.mean(0), y)


def outputs_meet_parameters(model, x, y):
    return F.cross_entropy(model(x) * model.weight.norm(), y)


def two_uses(model, x, y):
    return F.cross_entropy(model(x) + model(x.sin()), y)


def another_layer(model, x, y):
    return F.cross_entropy(F.linear(torch.tanh(model(x)), model.weight), y)


def without_the_layer(model, x, y):
    return F.cross_entropy(x @ model.weight.mT, y)


@pytest.mark.parametrize("loss", [rows_interact, outputs_meet_parameters, two_uses, another_layer, without_the_layer])
def test_leaves_other_losses_alone_and_newton_still_solves_them(loss):
    model, x, y = problem()
    if loss is another_layer:
        model, x = nn.Linear(D, D, dtype=torch.float64), x
    params = list(model.parameters())

    def closure():
        return loss(model, x, y) + 0.1 * sum(p.square().sum() for p in params)

    assert affine_hessian(closure, params, closure().detach()) is None
    before = torch.cat([p.detach().reshape(-1) for p in params])
    hessian = dense(closure, params) + 2.0 * torch.eye(len(before), dtype=torch.float64)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), params)])
    Newton(params, damping=2.0).step(closure)
    after = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(after, before - torch.linalg.solve(hessian, gradient), rtol=0, atol=1e-10)


def test_a_loss_that_changes_between_evaluations_is_left_alone():
    model, x, y = problem()
    draws = iter([0.1, 0.2, 0.3])

    def closure():
        return logistic(model, x, y) * next(draws)

    assert affine_hessian(closure, list(model.parameters()), closure().detach()) is None


def test_half_precision_gives_single_precision():
    model, x, y = problem()
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)

    def closure():
        return logistic(model, x, y)

    found = affine_hessian(closure, list(model.parameters()), closure().detach())
    assert found is not None and found.dtype == torch.float32


def test_newton_takes_it(monkeypatch):
    model, x, y = problem()
    optimizer = Newton(model.parameters(), damping=1e-3)
    monkeypatch.setattr(optimizer, "hessian", lambda params: pytest.fail("took a product for each parameter"))
    optimizer.step(lambda: ridge(model, x, y))
