"""Does Sophia follow its paper, with both of its estimates?"""

from __future__ import annotations

import pytest
import torch

from precond.closure.sophia import Sophia
from tests.precond import references as ref
from tests.precond.closure.test_adahessian import signs


def test_hutchinson_equals_dense_algebra():
    model = ref.SmallModel()
    state = {"m": 0.0, "h": 0.0}

    def expected(step, theta, g, hessian):
        state["m"] = 0.9 * state["m"] + 0.1 * g
        if (step - 1) % 3 == 0:
            z = signs(model, 0, step - 1)
            state["h"] = 0.7 * state["h"] + 0.3 * z * (hessian @ z)
        d = (state["m"] / (0.5 * state["h"]).clamp(min=1e-12)).clamp(-1, 1)
        return (1 - 0.01 * 0.1) * theta - 0.01 * d

    ref.assert_steps_equal(
        lambda model: Sophia(
            model.parameters(), lr=0.01, betas=(0.9, 0.7), gamma=0.5, weight_decay=0.1, curvature_update_period=3
        ),
        expected,
    )


def test_differentiates_twice_only_when_an_estimate_is_due(monkeypatch):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Sophia([p], curvature_update_period=4)
    calls = []
    product = optimizer.hessian_product

    def counted(v):
        calls.append(optimizer.state[p].get("step", 0))
        return product(v)

    monkeypatch.setattr(optimizer, "hessian_product", counted)
    for _ in range(9):
        optimizer.step(lambda: p.square().sum())
    assert calls == [0, 4, 8]


def test_gauss_newton_bartlett_runs_in_the_plain_loop():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Sophia([p], lr=0.1, betas=(0.5, 0.9), gamma=2.0, estimator="gauss_newton")
    p.grad = torch.tensor([0.3, 0.01], dtype=torch.float64)  # of the mean loss over 8 terms, on drawn labels
    optimizer.update_curvature(8)
    p.grad = torch.tensor([0.2, -3.0], dtype=torch.float64)
    optimizer.step()
    h = 0.1 * 8 * torch.tensor([0.09, 0.0001], dtype=torch.float64)
    d = (0.5 * torch.tensor([0.2, -3.0]) / (2.0 * h)).clamp(-1, 1)
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, -2.0], dtype=torch.float64) - 0.1 * d)
    assert abs(d[0]) < 1 == abs(d[1])


def test_refuses_to_step_without_any_curvature():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"Sophia knows no curvature of p yet\. Call update_curvature"):
        Sophia([("p", p)], estimator="gauss_newton").step()
    with pytest.raises(ValueError, match="is for Sophia"):
        Sophia([p]).update_curvature(3)
    with pytest.raises(ValueError, match="terms is the number of terms in the mean loss, positive; got 0"):
        Sophia([p], estimator="gauss_newton").update_curvature(0)
    with pytest.raises(TypeError, match=r"call step\(closure\)"):
        Sophia([p]).step()
    with pytest.raises(ValueError, match="estimator is one of hutchinson, gauss_newton, not 'exact'"):
        Sophia([p], estimator="exact")
    with pytest.raises(ValueError, match="gamma and eps must be positive"):
        Sophia([p], gamma=0.0)
