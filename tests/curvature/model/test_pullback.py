"""Transposed Jacobians against dense ones, wherever the inputs are and whether or not they can be vectorised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvature.model.pullback import Pullback

F64 = torch.float64


class OneByOne(torch.autograd.Function):
    """Doubles; its backward pass looks at values, which vmap cannot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        assert grads[0].abs().sum().item() >= 0
        return 2 * grads[0]


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_blocks_of_cotangents_give_products_with_the_transposed_jacobian(k: int, vectorised: bool) -> None:
    torch.manual_seed(0)
    A, x, unused = torch.randn(4, 5, dtype=F64), torch.randn(5, dtype=F64), torch.randn(2, dtype=F64)
    x.requires_grad_()
    unused.requires_grad_()
    h = x.square()
    y = A @ h
    y = y if vectorised else OneByOne.apply(y)  # type: ignore[no-untyped-call]
    factor = 1.0 if vectorised else 2.0
    v = torch.randn(k, 4, dtype=F64)
    pullback = Pullback([y, torch.ones(3)], [x, unused])
    found, nothing = pullback([v, torch.ones(k, 3)])
    torch.testing.assert_close(found, factor * (v @ A) * 2 * x.detach())
    assert torch.equal(nothing, torch.zeros(k, 2, dtype=F64))
    assert pullback.batched is (vectorised or k == 1)
    at_edge = Pullback([y], [get_gradient_edge(h), unused], batched=False).arriving([v])
    assert at_edge[0] is not None and at_edge[1] is None
    torch.testing.assert_close(at_edge[0], factor * v @ A)


def test_outputs_without_a_graph_give_zeros() -> None:
    x = torch.ones(3, requires_grad=True)
    pullback = Pullback([torch.ones(2)], [x])
    assert torch.equal(pullback([torch.ones(4, 2)])[0], torch.zeros(4, 3))
    assert torch.equal(pullback([torch.ones(2)], block=False)[0], torch.zeros(3))
    assert pullback.arriving([torch.ones(4, 2)]) == [None]
