"""Does PSGD follow its descent, and does it end at the whitening or at Newton's preconditioner?"""

from __future__ import annotations

import pytest
import torch

from precond.closure.psgd import PSGD
from precond.step.loop import Loop
from tests.precond import references as ref
from tests.precond.closure.test_adahessian import signs


def test_whitening_equals_the_reference():
    def make(model):
        return PSGD(
            model.parameters(),
            lr=0.05,
            beta=0.7,
            preconditioner_lr=0.3,
            damping=1e-4,
            eps=1e-3,
            max_rms=0.9,
            curvature_update_period=2,
        )

    options = {"lr": 0.05, "beta": 0.7, "rate": 0.3, "damping": 1e-4, "eps": 1e-3, "bound": 0.9}
    ref.assert_equals_reference(make, ref.psgd, options)


def test_hessian_equals_the_reference():
    model = ref.SmallModel()
    shapes = [tuple(p.shape) or (1,) for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    factors = [ref.KroneckerDescent(shape, 0.3, 1e-4, 1e-3) for shape in shapes]

    def expected(step, theta, g, hessian):
        v = signs(model, 2, step - 1)
        parts = [x.split(sizes) for x in (hessian @ v, v, g)]
        moves = []
        for f, shape, h, probe, slope in zip(factors, shapes, *parts, strict=True):
            f.update(h.reshape(shape).numpy(), probe.reshape(shape).numpy())
            moves.append(torch.from_numpy(f.precondition(slope.reshape(shape).numpy())).reshape(-1))
        return theta - 0.05 * torch.cat(moves)

    def make(model):
        options = {"preconditioner_lr": 0.3, "damping": 1e-4, "eps": 1e-3, "max_rms": None, "loop": Loop(seed=2)}
        return PSGD(model.parameters(), lr=0.05, beta=0.0, criterion="hessian", **options)

    ref.assert_steps_equal(make, expected)


def test_hessian_criterion_finds_the_inverse_curvature():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
    optimizer = PSGD([p], lr=0.0, criterion="hessian", preconditioner_lr=0.3)
    for _ in range(600):
        optimizer.step(lambda: (p * (matrix @ p)).sum() / 2)
    left, right = optimizer.state[p]["root.0"], optimizer.state[p]["root.1"]
    product = (left.mT @ left) * (right.mT @ right)
    torch.testing.assert_close(product, torch.linalg.inv(matrix), rtol=1e-3, atol=1e-3)


def test_whitening_of_a_constant_gradient_has_unit_size(generator):
    p = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    g = (torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)) * 1e-3
    optimizer = PSGD([p], lr=1.0, beta=0.0, preconditioner_lr=0.1, max_rms=None)
    for _ in range(800):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
    direction = before - p.detach()
    # C = T: (P g)(P g)^T = n I
    torch.testing.assert_close(direction @ direction.mT, 4 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_gradient_of_zero_teaches_nothing():
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = PSGD([p])
    p.grad = torch.zeros(3, 2)
    optimizer.step()
    assert optimizer.state[p]["updates"] == 0 and p.eq(1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": "newton"}, "criterion is one of whitening, hessian, not 'newton'"),
        ({"preconditioner_lr": 1.0}, r"preconditioner_lr is in \(0, 1\); got 1.0"),
        ({"max_rms": 0.0}, "max_rms is positive, or None"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PSGD([torch.nn.Parameter(torch.ones(2))], **options)


def test_hessian_criterion_needs_a_closure():
    with pytest.raises(TypeError, match=r"PSGD needs second derivatives: call step\(closure\)"):
        PSGD([torch.nn.Parameter(torch.ones(2))], criterion="hessian").step()
