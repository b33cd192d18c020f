"""Does GaLore run its inner optimizer in the leading singular directions?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from precond.gradient.galore import GaLore
from precond.gradient.soap import SOAP
from tests.precond import references as ref


def reference(theta, gradients, lr, rank, scale, period, betas, eps, decay):
    """Adam on the projected gradient; written with full matrices of the projection."""
    rows = len(theta) if theta.ndim else 1
    matrix = theta.reshape(rows, -1)
    projected = theta.ndim > 1 and min(matrix.shape) > rank
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        g = g.reshape(matrix.shape)
        tall = g.shape[0] > g.shape[1]
        if projected and (t == 1 or t % period == 0):
            u, _, vh = np.linalg.svd(g)
            p = vh[:rank].T if tall else u[:, :rank]
            p = p * np.sign(p[np.abs(p).argmax(0), range(rank)])
        r = g if not projected else g @ p if tall else p.T @ g
        m, v = betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r**2
        step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        if projected:
            step = scale * (step @ p.T if tall else p @ step)
        matrix = (1 - lr * decay) * matrix - lr * step
        yield matrix.reshape(theta.shape)


def test_equals_the_reference():
    options = {"betas": (0.9, 0.8), "eps": 1e-6}

    def make(model):
        return GaLore(
            model.parameters(),
            lr=0.02,
            rank=2,
            scale=0.5,
            inverse_update_period=3,
            weight_decay=0.1,
            inner_options=options,
        )

    given = {"lr": 0.02, "rank": 2, "scale": 0.5, "period": 3, "decay": 0.1}
    ref.assert_equals_reference(make, reference, {**given, **options})


@pytest.mark.parametrize(
    "inner, options",
    [
        (torch.optim.Adam, {"betas": (0.8, 0.9)}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (SOAP, {"betas": (0.8, 0.9), "inverse_update_period": 3}),
    ],
)
def test_of_full_rank_it_is_its_inner_optimizer(inner, options):
    ours = ref.run(lambda model: GaLore(model.parameters(), lr=0.01, rank=4, inner=inner, inner_options=options))[0]
    theirs = ref.run(lambda model: inner(model.parameters(), lr=0.01, **options))[0]
    for name, values in ours.items():
        np.testing.assert_allclose(values[-1], theirs[name][-1], rtol=0, atol=1e-12, err_msg=name)


def test_decay_of_the_inner_optimizer_is_not_applied_twice(generator):
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.zeros(2, 2)
    GaLore([p], lr=0.1, inner=torch.optim.AdamW).step()
    assert p.eq(1).all()


def test_state_has_the_size_of_the_projection(generator):
    p = torch.nn.Parameter(torch.ones(6, 10))
    p.grad = torch.randn(6, 10, generator=generator)
    optimizer = GaLore([p], rank=2)
    optimizer.step()
    assert optimizer.state[p]["inner.exp_avg"].shape == (2, 10)
    assert torch.linalg.matrix_rank(1 - p.detach()) == 2


def test_refuses():
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        GaLore([p], rank=0)
    with pytest.raises(ValueError, match="give lr, weight_decay to GaLore, not in inner_options"):
        GaLore([p], inner_options={"lr": 1.0, "weight_decay": 0.1})
