"""Are derivatives through a graph those of the definition, and is everything put back?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond.step.graph import (
    BackwardDoesNothing,
    CurvedOutput,
    GaussNewtonMatrix,
    curved_outputs,
    flatten,
    gram,
    jacobian_rows,
    loss_calls,
    loss_tensor,
    parameters_at,
    second_derivatives,
    unflatten,
)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, list(model.parameters()), torch.randn(5, 3, dtype=torch.float64)


def dense_jacobian(model, x):
    """``(N, P)`` by ``torch.func``."""
    names = dict(model.named_parameters())
    values = {name: p.detach() for name, p in names.items()}
    rows = torch.func.jacrev(lambda v: torch.func.functional_call(model, v, (x,)).reshape(-1))(values)
    return torch.cat([rows[name].flatten(1) for name in names], 1)


@pytest.mark.parametrize("chunk", [1, 3, 9, 64])
def test_rows_of_a_jacobian_do_not_depend_on_the_chunk(chunk):
    model, params, x = problem()
    rows = jacobian_rows(model(x).reshape(-1), params, chunk)
    torch.testing.assert_close(rows, dense_jacobian(model, x), rtol=0, atol=1e-14)


def test_rows_of_a_jacobian_where_an_operation_cannot_be_batched():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(2 * g.numpy())

    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    unused = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    rows = jacobian_rows(Double.apply(p), [p, unused])
    assert torch.equal(rows, torch.cat([2 * torch.eye(3), torch.zeros(3, 1)], 1).double())


def test_second_derivatives_equal_those_of_torch_func():
    a, b, unused = (torch.nn.Parameter(torch.rand(n, dtype=torch.float64)) for n in (3, 2, 2))

    def loss(a, b):
        return (a.sin() * a.roll(1)).sum() * b.exp().sum()

    slopes = torch.autograd.grad(loss(a, b), [a, b], create_graph=True)
    found = second_derivatives([*slopes, None], [a, b, unused])
    rows = torch.func.hessian(loss, (0, 1))(a.detach(), b.detach())
    expected = torch.zeros(7, 7, dtype=torch.float64)
    expected[:5, :5] = torch.cat([torch.cat(row, 1) for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert not second_derivatives([None], [unused]).any()


def test_flatten_and_back():
    _, params, _ = problem()
    half = torch.ones(2, dtype=torch.bfloat16)
    assert flatten({half: half}).dtype == torch.float32
    found = unflatten(flatten({p: p.detach() for p in params}), params)
    assert all(torch.equal(found[p], p) for p in params)


def test_products_push_pull_and_gram_equal_the_dense_matrix():
    model, params, x = problem()
    root = torch.randn(10, 10, dtype=torch.float64)
    hessian = root @ root.mT
    matrix = GaussNewtonMatrix([CurvedOutput(model(x), lambda v: (hessian @ v.reshape(-1)).view_as(v))], params)
    jacobian = dense_jacobian(model, x)
    expected = jacobian.mT @ hessian @ jacobian
    vectors = torch.randn(3, jacobian.shape[1], dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(matrix.operator() @ vectors[0], expected @ vectors[0], **close)
    torch.testing.assert_close(matrix.push(vectors[0])[0].reshape(-1), jacobian @ vectors[0], **close)
    torch.testing.assert_close(matrix.pull([x.new_ones(5, 2)]), jacobian.sum(0), **close)
    torch.testing.assert_close(matrix.gram(list(vectors)), vectors @ expected @ vectors.mT, **close)
    images = [matrix.push(v) for v in vectors]
    torch.testing.assert_close(gram(matrix.outputs, images), matrix.gram(list(vectors)), rtol=0, atol=0)


def test_outputs_that_a_loss_saw_with_their_weights():
    model, _, x = problem()
    loss_fn, y = nn.MSELoss(), torch.zeros(5, 2, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), loss_calls(loss_fn):
        raise ZeroDivisionError
    with loss_calls(loss_fn) as calls:
        with torch.no_grad():
            loss_fn(model(x), y)
        loss_fn(model(x), y)  # not in the loss
        loss = 3 * loss_fn(target=y, input=model(x))
    assert not loss_fn._forward_hooks and len(calls) == 3
    (output,) = curved_outputs(loss_fn, calls, loss)
    assert output.value is calls[2].kwargs["input"]
    assert torch.equal(output.hessian(torch.ones_like(y)), torch.full_like(y, 3 * 2 / 10))
    assert output.scale == pytest.approx(3 / 10)
    with pytest.raises(ValueError, match="holds a negative multiple of MSELoss"):
        curved_outputs(loss_fn, calls, loss, -1)
    assert curved_outputs(loss_fn, calls[:1], loss) == []


def test_parameters_are_put_back():
    _, params, _ = problem()
    before = [p.detach().clone() for p in params]
    storage = [p.data_ptr() for p in params]
    with pytest.raises(ZeroDivisionError), parameters_at({p: torch.zeros_like(p) for p in params}):
        assert not any(bool(p.any()) for p in params)
        raise ZeroDivisionError
    assert all(torch.equal(p, own) for p, own in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == storage


def test_backward_does_nothing_inside():
    p = torch.nn.Parameter(torch.ones(()))
    with BackwardDoesNothing():
        (2 * p).backward()
    assert p.grad is None
    (2 * p).backward()
    assert p.grad == 2


def test_a_loss_is_one_number_with_its_graph():
    p = torch.nn.Parameter(torch.ones(1))
    assert loss_tensor(p * 2, "Newton").shape == ()
    with pytest.raises(TypeError, match=r"of Newton must .*, not a tensor of shape \(1,\) without one\. Return"):
        loss_tensor(p.detach(), "Newton")
    with pytest.raises(TypeError, match=r"not float\. Return the loss itself"):
        loss_tensor(1.0, "Newton")
