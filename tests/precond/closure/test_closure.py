"""What may a closure do, and what does the optimizer say otherwise?"""

from __future__ import annotations

import pytest
import torch

from precond.closure.newton import Newton
from precond.step.adapt import LevenbergMarquardt


def parameter():
    return torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("rule", [None, LevenbergMarquardt()])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_closure_may_call_zero_grad_and_backward_as_for_lbfgs(rule, set_to_none):
    p = parameter()
    optimizer = Newton([p], damping_rule=rule)  # a rule evaluates the closure again

    def closure():
        optimizer.zero_grad(set_to_none)
        loss = (p - 3).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 5.0 and not loss.requires_grad
    assert p.tolist() == pytest.approx([3.0, 3.0])
    assert p.grad.tolist() == [-4.0, -2.0]


def test_backward_works_again_after_the_step():
    p = parameter()
    Newton([p]).step(lambda: p.square().sum())
    p.grad = None
    (3 * p).sum().backward()
    assert p.grad.tolist() == [3.0, 3.0]


def test_no_graph_is_left():
    p = parameter()
    optimizer = Newton([p])
    optimizer.step(lambda: p.square().sum())
    assert optimizer._slopes is None and p.grad.grad_fn is None
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: p.sum() / (1 // 0))
    assert optimizer._slopes is None


def test_precondition_rewrites_the_gradient_only():
    p = parameter()
    Newton([p]).precondition(lambda: (p - 3).square().sum())
    assert p.tolist() == [1.0, 2.0]
    assert p.grad.tolist() == pytest.approx([-2.0, -1.0])


def test_unused_and_frozen_parameters_stay():
    p, unused, frozen = parameter(), parameter(), parameter()
    frozen.requires_grad_(False)
    frozen.grad = torch.ones(2, dtype=torch.float64)
    Newton([p, unused, frozen]).step(lambda: (p * frozen).square().sum())
    assert p.tolist() == pytest.approx([0.0, 0.0])
    assert unused.tolist() == [1.0, 2.0] and frozen.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.square().sum().item(), "must return the loss as a tensor .*not float"),
        (lambda p: p.square().sum().detach(), r"must return the loss .*not a tensor of shape \(\) without one"),
        (lambda p: p.square(), r"must return the loss as a tensor .*not a tensor of shape \(2,\)"),
        (lambda p: None, "returned None and ran no backward pass: it must compute the loss of one batch and return it"),
    ],
)
def test_refuses_what_is_no_loss(make, message):
    p = parameter()
    with pytest.raises(TypeError, match=message):
        Newton([p]).step(lambda: make(p))


def test_refuses_a_graph_that_was_freed():
    p = parameter()

    def closure():
        loss = p.square().sum()
        torch.autograd.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match="freed the graph of the loss"):
        Newton([p]).step(closure)


def test_refuses_a_step_without_closure():
    for call in (Newton([parameter()]).step, Newton([parameter()]).precondition):
        with pytest.raises(TypeError, match=r"Newton needs second derivatives: call step\(closure\)"):
            call()
