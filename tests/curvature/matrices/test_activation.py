"""Hessians with respect to activations against the Hessian of the rest of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

import curvature
from tests.curvature.problems import normal


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return normal(3, 3), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("name", ["0", "2", "3", "4"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hessian_of_the_rest_of_the_model(model: nn.Sequential, name: str, reduction: str) -> None:
    x, y = batch()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    cut = int(name) + 1
    h = model[:cut](x).detach()
    if name == "0":
        h = nn.functional.linear(x, *model[0].parameters()).detach()  # before the activation that works in place
    expected = hessian(lambda h: loss(model[cut:](h.clone()), y), h)
    H = curvature.activation_hessian(model, loss, (x, y), name)
    assert H.in_shape == h.shape and H.symmetric
    torch.testing.assert_close(H.to_dense(), expected.reshape(h.numel(), h.numel()), rtol=1e-10, atol=1e-12)
    v = normal(2, *h.shape)
    torch.testing.assert_close(H @ v, torch.tensordot(v, expected, h.dim()), rtol=1e-10, atol=1e-12)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_opaque_losses(model: nn.Sequential) -> None:
    x, y = batch()
    H = curvature.activation_hessian(model, lambda z, y: z.square().sum(), (x, y), "4")
    torch.testing.assert_close(H.to_dense(), 2 * torch.eye(6).double())


def test_refusals(model: nn.Sequential) -> None:
    x, y = batch()
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"no module 'block'. There are: 0, 1, 2, 3, 4\."):
        curvature.activation_hessian(model, loss, (x, y), "block")
    with pytest.raises(TypeError, match="expected one batch"):
        curvature.activation_hessian(model, loss, [(x, y)], "0")  # type: ignore[arg-type]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never, self.aside = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.pair = nn.LSTM(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.pair(self.used(self.used(x)).unsqueeze(1))[0][:, 0]

    twice = Twice().double()
    for name, times in (("used", 2), ("never", 0)):
        with pytest.raises(ValueError, match=f"{name} was called {times} times"):
            curvature.activation_hessian(twice, loss, (x, y), name)
    with pytest.raises(ValueError, match="the loss does not depend on what aside returns"):
        curvature.activation_hessian(twice, loss, (x, y), "aside")
    with pytest.raises(TypeError, match="pair returns a tuple"):
        curvature.activation_hessian(twice, loss, (x, y), "pair")
    assert not any(m._forward_hooks for m in twice.modules())
    H = curvature.activation_hessian(model, loss, (x, y), "3")
    with torch.no_grad():
        model.get_parameter("4.weight").add_(1)
    with pytest.raises(RuntimeError, match=r"4\.weight was changed"):
        H @ normal(3, 4)
