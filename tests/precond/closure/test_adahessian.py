"""Does AdaHessian follow its paper?"""

from __future__ import annotations

import pytest
import torch

from precond.closure.adahessian import AdaHessian
from precond.step.graph import rademacher
from precond.step.loop import Loop
from tests.precond import references as ref


def signs(model, seed, step):
    """The draws of a step, flat: a function of seed, number of steps before, and place."""
    return torch.cat([rademacher(p, seed, step, i).reshape(-1) for i, p in enumerate(model.parameters())])


def test_signs_are_random_and_repeatable():
    p = torch.zeros(1000, dtype=torch.float64)
    first = rademacher(p, 3, 5, 1)
    assert set(first.tolist()) == {-1.0, 1.0} and abs(first.mean()) < 0.15
    assert torch.equal(first, rademacher(p, 3, 5, 1))
    for other in (rademacher(p, 4, 5, 1), rademacher(p, 3, 6, 1), rademacher(p, 3, 5, 2)):
        assert abs((first * other).mean()) < 0.15


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_equals_dense_algebra(power):
    model = ref.SmallModel()
    sizes = [p.numel() for p in model.parameters()]
    moments = [torch.zeros(sum(sizes), dtype=torch.float64) for _ in range(2)]

    def expected(step, theta, g, hessian):
        z = signs(model, 4, step - 1)
        h = (z * (hessian @ z)).abs()
        kernels = h[1:25].reshape(3, 2, 4).mean(2, keepdim=True).expand(3, 2, 4)
        h = torch.cat([h[:1], kernels.reshape(-1), h[25:]])  # the scale comes first
        moments[0] = 0.9 * moments[0] + 0.1 * g
        moments[1] = 0.8 * moments[1] + 0.2 * h**2
        root = (moments[1] / (1 - 0.8**step)).sqrt() ** power
        return (1 - 0.05 * 0.1) * theta - 0.05 * (moments[0] / (1 - 0.9**step)) / (root + 1e-3)

    ref.assert_steps_equal(
        lambda model: AdaHessian(
            model.parameters(),
            lr=0.05,
            betas=(0.9, 0.8),
            eps=1e-3,
            hessian_power=power,
            weight_decay=0.1,
            loop=Loop(seed=4),
        ),
        expected,
    )


def test_of_a_separable_quadratic_it_is_newton():
    curvature = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    AdaHessian([p], lr=1.0, eps=0.0).step(lambda: (curvature * p.square()).sum() / 2)
    assert p.abs().max() < 1e-14


def test_refuses_a_power_out_of_range():
    with pytest.raises(ValueError, match=r"hessian_power is in \(0, 1\]; got 0"):
        AdaHessian([torch.nn.Parameter(torch.ones(1))], hessian_power=0)
