"""Does SOAP follow its paper, and where does it become Adam?"""

from __future__ import annotations

import pytest
import torch

from precond.gradient.soap import SOAP
from tests.precond import references as ref


@pytest.mark.parametrize("period", [1, 4])
def test_equals_the_reference(period):
    ref.assert_equals_reference(
        lambda model: SOAP(
            model.parameters(), lr=0.02, betas=(0.9, 0.8), eps=1e-6, weight_decay=0.1, inverse_update_period=period
        ),
        ref.soap,
        {"lr": 0.02, "betas": (0.9, 0.8), "eps": 1e-6, "period": period, "decay": 0.1},
    )


def test_without_rotation_it_is_adam():
    def trained(make):
        return ref.run(lambda model: make(model.parameters(), lr=0.02, betas=(0.9, 0.99), weight_decay=0.1))[0]

    ours = trained(lambda params, **options: SOAP(params, max_dim=1, **options))
    theirs = trained(torch.optim.AdamW)
    for name, values in ours.items():
        torch.testing.assert_close(
            torch.tensor(values[-1]), torch.tensor(theirs[name][-1]), rtol=0, atol=1e-13, msg=f"{name} differs"
        )


def test_joined_axes_and_vectors_can_rotate(generator):
    convolution, vector = torch.nn.Parameter(torch.ones(3, 2, 2, 2)), torch.nn.Parameter(torch.ones(5))
    optimizer = SOAP([convolution, vector], lr=3e-3, merge_dims=8, rotate_vectors=True)
    convolution.grad, vector.grad = torch.randn(3, 2, 2, 2, generator=generator), torch.tensor([1.0, -2, 3, 0.5, 1])
    optimizer.step()
    assert optimizer.state[convolution]["basis.1"].shape == (8, 8)
    assert optimizer.state[vector]["basis.0"].shape == (5, 5)
    # Along the eigenvector of its only gradient a vector moves by the learning rate, and hardly elsewhere: without a
    # floor, each of the four directions of zero gradient would move by half the learning rate from rounding errors.
    moved = 1 - vector.detach()
    torch.testing.assert_close(moved, 3e-3 * vector.grad / vector.grad.norm(), rtol=0, atol=3e-4)
