"""Layers in a reentrant checkpoint count where nothing in front of it is tracked, as with frozen layers and LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvature
import precond


class Net(nn.Module):
    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.front, self.inner, self.hidden = nn.Linear(3, 4), nn.Linear(4, 3), hidden
        self.front.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x).tanh().requires_grad_()  # as enable_input_require_grads() of transformers
        return checkpoint(self.inner, h, use_reentrant=True) if self.hidden else self.inner(h)


def net(hidden: bool) -> Net:
    torch.manual_seed(0)
    return Net(hidden).double()


X, Y, LOSS = torch.linspace(-1, 1, 15).double().reshape(5, 3), torch.tensor([0, 1, 2, 1, 0]), nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    "matrix",
    [
        lambda m: curvature.ggn(m, LOSS, (X, Y), structure="full").to_dense(),
        lambda m: curvature.ggn(m, LOSS, (X, Y), structure="layer").to_dense(),
        lambda m: curvature.hessian(m, LOSS, (X, Y)).to_dense(),
        lambda m: curvature.per_sample_gradients(m, LOSS, (X, Y))["inner.weight"],
        lambda m: curvature.jacobian(m, X).to_dense(),
    ],
    ids=["full", "layer", "hessian", "per_sample", "jacobian"],
)
def test_data_sets_see_what_a_checkpoint_hides(matrix) -> None:
    right = matrix(net(False))
    assert right.abs().max() > 1e-2
    torch.testing.assert_close(matrix(net(True)), right, rtol=1e-12, atol=1e-14)


def test_closures_see_what_a_checkpoint_hides() -> None:
    after = []
    for model in (net(False), net(True)):
        optimizer = precond.Newton(model.parameters(), damping=0.1)
        optimizer.step(lambda model=model: LOSS(model(X), Y))
        after.append(model.inner.weight.detach())
    assert (after[0] - net(False).inner.weight).abs().max() > 1e-3
    torch.testing.assert_close(after[1], after[0], rtol=1e-9, atol=1e-12)
