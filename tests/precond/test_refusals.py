"""Is everything that cannot be done right refused, with a message that says what to do?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.losses import AmbiguousClassAxisError, UnknownLossError
from precond import EKFAC, KFAC, KroneckerFisher, Loop, Momentum
from tests.curvature.loops import assert_same, batch, mlp, statistics, watching

X, Y = batch(6)


class Odd(nn.Module):
    """A loss nobody registered."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).abs().pow(3).mean()


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=-0.1), ValueError, "lr must be a non-negative"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=torch.tensor(-0.1)), ValueError, "lr must be a non-negative"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=float("nan")), ValueError, "lr must be a non-negative"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, damping=-1e-3), ValueError, "damping must be"),
        (lambda: EKFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, damping=-1e-3), ValueError, "damping must be"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, momentum=-0.9), ValueError, "momentum must be a non-neg"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, weight_decay=-1), ValueError, "weight_decay must be"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, kl_clip=0.0), ValueError, "kl_clip must be positive"),
        (
            lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, momentum=Momentum(0.0, nesterov=True)),
            ValueError,
            "nesterov",
        ),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, curvature_ema=1.0), ValueError, r"in \[0, 1\)"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, inverse_update_period=0), ValueError, "at least 1"),
        (
            lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, fisher=KroneckerFisher(samples=0)),
            ValueError,
            "samples must be at least 1",
        ),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, fisher="true"), ValueError, "fisher is one of"),  # type: ignore[arg-type]
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, loop=Loop(capture="hooks")), ValueError, "capture must be"),
        (
            lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, loop=Loop(nonfinite="ignore")),
            ValueError,
            "nonfinite must be",
        ),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, params=[]), ValueError, "params= is empty"),
        (lambda: KFAC(mlp(), nn.CrossEntropyLoss(), lr=0.1, params=["3.*"]), ValueError, "no trainable parameter"),
        (lambda: KFAC(frozen(), nn.CrossEntropyLoss(), lr=0.1), ValueError, "has no trainable parameter"),
        (lambda: KFAC(nn.ReLU(), nn.CrossEntropyLoss(), lr=0.1), ValueError, "has no trainable parameter"),
        (lambda: KFAC(mlp().parameters(), nn.CrossEntropyLoss(), lr=0.1), TypeError, "pass the model itself, not gen"),
        (lambda: KFAC(mlp(), Odd(), lr=0.1), UnknownLossError, "empirical"),
        (lambda: KFAC(mlp(), Odd(), lr=0.1), UnknownLossError, "register"),
        (lambda: KFAC(mlp(), None, lr=0.1), TypeError, "loss_fn is a loss"),
        (
            lambda: KFAC(
                mlp(), nn.CrossEntropyLoss(), lr=0.1, params=[{"params": [torch.ones(2).double().requires_grad_()]}]
            ),
            ValueError,
            "a tensor of shape \\(2,\\), which is no trainable parameter",
        ),
    ],
)
def test_at_construction(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_unknown_loss_may_be_empirical() -> None:
    model, target = mlp(), F.one_hot(Y, 3).double()
    optimizer = KFAC(model, Odd(), lr=0.01, fisher="empirical")
    optimizer.loss_fn(model(X), target).backward()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# Steps ---------------------------------------------------------------------------------------------------------------


def forget_the_model(model: nn.Module, loss_fn: nn.Module) -> Tensor:
    """Pass (a): another way to the output."""
    return loss_fn(model[2](model[1](model[0](X))), Y)  # type: ignore[index]


def in_eval_mode(model: nn.Module, loss_fn: nn.Module) -> Tensor:
    return loss_fn(model.eval()(X), Y)


def with_another_loss(model: nn.Module, loss_fn: nn.Module) -> Tensor:
    return nn.CrossEntropyLoss()(model(X), Y)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (forget_the_model, {}, "the loop calls the model given to the optimizer"),
        (in_eval_mode, {}, "eval mode now: call model.train\\(\\), or pass loop=Loop\\(eval_mode=True"),
        (with_another_loss, {"loop": Loop(capture="loss")}, "it calls the loss module given to the optimizer"),
    ],
)
def test_a_refresh_without_a_captured_pass(loss: Any, options: dict[str, Any], message: str) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, **options)
    loss(model, loss_fn).backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.steps == 0
    # Done right, the loop goes on.
    model.train()
    optimizer.zero_grad()
    loss_fn(model(X), Y).backward()
    optimizer.step()


def test_a_second_step_on_the_same_gradient() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    loss_fn(model(X), Y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(\) is called once per backward"):
        optimizer.step()


def test_eval_mode_is_captured_where_it_is_meant() -> None:
    model, loss_fn = mlp().eval(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, loop=Loop(eval_mode=True))
    loss_fn(model(X), Y).backward()
    optimizer.step()
    assert len(optimizer.preconditioners) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("functional", [False, True], ids=["loss module", "functional loss"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_gradients_that_are_not_finite(nonfinite: Any, functional: bool, value: float) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    call = F.cross_entropy if functional else loss_fn
    optimizer = KFAC(model, loss_fn, lr=0.1, loop=Loop(nonfinite=nonfinite))
    call(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    weights, factors = [p.clone() for p in model.parameters()], statistics(optimizer)
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]

    bad = X.clone()
    bad[0, 0] = value
    call(model(X), Y).backward()  # a good micro-batch before the bad one
    call(model(bad), Y).backward()
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"holds NaN or inf \(\d of 4 parameters.*nonfinite='skip'"):
            optimizer.step()
    else:
        with pytest.warns(RuntimeWarning, match=r"skips a step \(1 so far\): a gradient holds NaN or inf"):
            optimizer.step()
        assert optimizer.skipped == 1
    assert optimizer.steps == 1
    assert_same(statistics(optimizer), factors, 1e-300)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    for p, buffer in zip(model.parameters(), momentum, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)

    # The next step is what it would have been.
    other = mlp()
    fresh = KFAC(other, loss_fn, lr=0.1)
    for _ in range(2):
        fresh.zero_grad()
        call(other(X), Y).backward()
        fresh.step()
    optimizer.zero_grad()
    call(model(X), Y).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_sparse_gradients() -> None:
    model, loss_fn = nn.Sequential(nn.Embedding(5, 3, sparse=True)), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    loss_fn(model(torch.tensor([1, 2])), torch.tensor([0, 1])).backward()
    with pytest.raises(TypeError, match=r"sparse gradient.*sparse=False"):
        optimizer.step()


def test_one_block_with_two_dampings() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    groups = [{"params": weights, "damping": 0.1}, {"params": biases, "damping": 0.2}]
    optimizer = KFAC(model, loss_fn, lr=0.1, params=groups)
    loss_fn(model(X), Y).backward()
    with pytest.raises(ValueError, match=r"groups with different damping \[0.1, 0.2\].*bias='separate'"):
        optimizer.step()
    separate = KFAC(model, loss_fn, lr=0.1, fisher=KroneckerFisher(bias="separate"), params=groups)
    loss_fn(model(X), Y).backward()
    separate.step()


# The gradient tap ----------------------------------------------------------------------------------------------------


class Images(nn.Module):
    """Outputs ``(N, C, C)``: nothing but the gradient tells the class axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_class_axis_that_cannot_be_told() -> None:
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    model, loss_fn = Images(), nn.CrossEntropyLoss()
    optimizer = watching(model, loss_fn)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    sides = signs.outer(signs).expand(2, 4, 4)  # sums to zero along both axes
    with pytest.raises(AmbiguousClassAxisError, match=r"2 of the axes 1 and 2 sum to zero.*Pass class_dim="):
        (model(x) * sides).sum().backward()
    told = watching(model, loss_fn, class_dim=1)
    optimizer.detach()
    (model(x) * sides).sum().backward()
    told.step()


def test_a_loss_that_is_more_than_a_cross_entropy() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = watching(model, loss_fn)
    z = model(X)
    with pytest.raises(AmbiguousClassAxisError, match="call the loss module that was given to the optimizer"):
        (F.cross_entropy(z, Y) + 0.1 * z.logsumexp(-1).square().mean()).backward()
    optimizer.detach()


@pytest.mark.parametrize(
    ("loss_fn", "kind", "loss"),
    [
        (nn.MSELoss(), "empirical", lambda z: F.mse_loss(z, F.one_hot(Y, 3).double())),
        (nn.CrossEntropyLoss(), "empirical", lambda z: F.cross_entropy(z, X[:, :3].softmax(-1))),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "empirical", lambda z: F.cross_entropy(z, X[:, :3].softmax(-1))),
        (
            nn.CrossEntropyLoss(torch.tensor([0.1, 1.0, 3.0]).double()),
            "exact",
            lambda z: F.cross_entropy(z, X[:, :3].softmax(-1), torch.tensor([0.1, 1.0, 3.0]).double()),
        ),
        (nn.HuberLoss(), "exact", lambda z: F.huber_loss(z, F.one_hot(Y, 3).double())),
    ],
    ids=["squared error, empirical", "soft labels, empirical", "smoothed, empirical", "soft labels, weights", "huber"],
)
def test_targets_that_the_gradient_does_not_show(loss_fn: nn.Module, kind: str, loss: Any) -> None:
    model = mlp()
    optimizer = watching(model, loss_fn, kind=kind)
    with pytest.raises(TypeError, match="Call the loss module that was given to the optimizer"):
        loss(model(X)).backward()
    optimizer.detach()


def test_an_unknown_scale() -> None:
    model = mlp()
    optimizer = watching(model, Odd(), kind="empirical")
    with pytest.raises(TypeError, match=r"the scale of whatever backward\(\) is called on.*capture='gradient'"):
        model(X).pow(4).mean().backward()
    optimizer.detach()
