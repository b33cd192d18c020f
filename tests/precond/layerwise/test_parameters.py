"""Is every parameter trained, and every one without curvature reported, whatever happens to it?"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from precond import EKFAC, KFAC, Loop
from tests.curvature.loops import assert_same, batch, fisher, mlp, statistics

X, Y = batch(8)


class Exponential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.layer, self.head = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.exp(self.log_scale) * x).tanh())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.reshape(-1, 2, 2))[0][:, -1])


class Frozen(nn.Module):
    """A frozen bias, a frozen weight, a bare weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.a.bias.requires_grad_(False)
        self.b.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(X), Y).backward()
        optimizer.step()


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("make", [KFAC, EKFAC])
@pytest.mark.parametrize("build", [Exponential, Normed, Recurrent, Frozen])
def test_models_with_unsupported_pieces_train_every_parameter(build: Any, make: Any, fisher: Any) -> None:
    """All of them by a curvature of their own: nothing is reported."""
    torch.manual_seed(0)
    model, loss_fn = build().double(), nn.CrossEntropyLoss()
    before = copies(model)
    optimizer = make(model, loss_fn, lr=0.01, fisher=fisher)
    train(model, optimizer, loss_fn)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved(model, before) == trainable
    covered = {name for p in optimizer.preconditioners.values() for name in p.estimator.block.names}
    assert covered == trainable


class Hidden(torch.autograd.Function):
    """A kernel of one's own, which nothing can look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.mT, x.mT @ grads[0]


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Hidden.apply(x, self.weight).tanh())


def test_a_kernel_no_function_mode_sees_gets_its_diagonal_by_autograd() -> None:
    torch.manual_seed(0)
    model, loss_fn = Kernel().double(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.01, momentum=0.0)
    loss_fn(model(X), Y).backward()
    optimizer.step()
    assert optimizer.coverage()["weight"].structure == "diagonal"
    assert "by autograd" in optimizer.coverage()["weight"].why


class Outside(nn.Module):
    """A parameter that the loop uses by itself, outside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.weight = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_a_parameter_nothing_is_known_of_takes_its_plain_gradient_and_is_reported_once() -> None:
    torch.manual_seed(0)
    model, loss_fn = Outside().double(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.01, momentum=0.0, kl_clip=None)
    before = copies(model)
    (loss_fn(model(X), Y) + model.weight.square().sum()).backward()
    with pytest.warns(UserWarning, match="^KFAC: weight has a gradient but no curvature.*plain gradient") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert model.weight.grad is not None
    assert torch.allclose(model.weight, before["weight"] - 0.01 * model.weight.grad)
    train(model, optimizer, loss_fn)  # warnings are errors here


class Branches(nn.Module):
    """A layer that is never used, and one that is used on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head, self.use = nn.Linear(4, 3), True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(self.sometimes(h).tanh() if self.use else h)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_unused_layers_keep_their_factors_and_their_weights(make: Any, set_to_none: bool) -> None:
    torch.manual_seed(0)
    model, loss_fn = Branches().double(), nn.CrossEntropyLoss()
    options = {"lr": 0.05, "fisher": "exact", "momentum": 0.0, "curvature_ema": 0.5, "curvature_update_period": 1}
    optimizer = make(model, loss_fn, **options)
    seen = []
    for number in range(6):
        model.use = number % 2 == 1
        before, factors = copies(model), statistics(optimizer)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_fn(model(X), Y).backward()
        optimizer.step()
        used = {"first", "head"} | ({"sometimes"} if model.use else set())
        assert {name.split(".")[0] for name in moved(model, before)} == used
        now = statistics(optimizer)
        if not model.use and "sometimes.weight+sometimes.bias" in factors:
            kept = "sometimes.weight+sometimes.bias"
            assert torch.equal(now[kept], factors[kept])
        seen.append(now)
    # The weight of its mean counts its own uses: three of them, each half as heavy as the next.
    own = optimizer.preconditioners["sometimes.weight+sometimes.bias"].estimator.state_dict()
    mean = own["straight"]["A"] if make is KFAC else own["spectrum"]
    assert mean["weight"] == 1 + 0.5 + 0.25
    assert not any("never" in name for name in optimizer.preconditioners)


def test_layers_that_come_later_are_covered_when_they_come() -> None:
    torch.manual_seed(0)
    model, loss_fn = Branches().double(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.05, curvature_update_period=2)
    model.use = False
    train(model, optimizer, loss_fn, 1)
    model.use = True
    loss_fn(model(X), Y).backward()
    with pytest.warns(UserWarning, match="sometimes.* has a gradient but no curvature yet"):
        optimizer.step()  # between two refreshes
    train(model, optimizer, loss_fn, 2)
    assert "sometimes.weight+sometimes.bias" in optimizer.preconditioners


# Freezing ------------------------------------------------------------------------------------------------------------


def test_unfreezing_with_add_param_group() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, loss_fn, lr=0.05, fisher="exact", curvature_ema=0.0)
    before = copies(model)
    train(model, optimizer, loss_fn)
    assert moved(model, before) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    before = copies(model)
    train(model, optimizer, loss_fn, 1)
    assert moved(model, before) == set(before)
    now = copies(model)
    model.load_state_dict(before)
    assert_same(statistics(optimizer), fisher(model, loss_fn, (X, Y), kind="exact"))
    model.load_state_dict(now)
    before = copies(model)
    train(model, optimizer, loss_fn, 2)
    assert moved(model, before) == set(before)


@pytest.mark.parametrize("capture", ["auto", "shadow"])
@pytest.mark.parametrize("period", [1, 2])
def test_freezing_and_unfreezing_in_the_middle(period: int, capture: Any) -> None:
    """Blocks follow: a weight and its bias are one block again when both are trained again."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, loss_fn, lr=0.05, loop=Loop(capture=capture), curvature_update_period=period, fisher="exact"
    )
    train(model, optimizer, loss_fn)
    for weight, bias, blocks in [
        (False, True, {"0.bias"}),
        (True, False, {"0.weight"}),
        (False, False, set()),
        (True, True, {"0.weight+0.bias"}),
    ]:
        model[0].weight.requires_grad_(weight)
        model[0].bias.requires_grad_(bias)
        before = copies(model)
        with warnings.catch_warnings():
            if period > 1:
                warnings.simplefilter("ignore")  # until the next refresh such a bias has no curvature
            train(model, optimizer, loss_fn, 2)
        expected = {"2.weight", "2.bias"} | ({"0.weight"} if weight else set()) | ({"0.bias"} if bias else set())
        assert moved(model, before) == expected
        assert {name for name in optimizer.preconditioners if name.startswith("0") and blocks} == blocks
        optimizer.load_state_dict(optimizer.state_dict())


def test_unfreezing_what_was_given_frozen() -> None:
    """A parameter in a group that was frozen from the start is trained from the moment it is not."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, loss_fn, lr=0.05, params=[{"params": list(model.parameters())}])
    train(model, optimizer, loss_fn)
    model[0].requires_grad_(True)
    before = copies(model)
    train(model, optimizer, loss_fn, 1)
    assert moved(model, before) == set(before)
    assert "0.weight+0.bias" in optimizer.preconditioners


class Slices(nn.Module):
    """One weight in two layers with biases of their own, of which the second is used in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
        self.first, self.second = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 2))
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight[:4], self.first)
        return y + nn.functional.linear(x, self.weight[4:], self.second).repeat(1, 2) if self.both else y


def test_part_of_a_parameter_stays_where_its_block_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn = Slices(), nn.MSELoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, momentum=0.0, damping=1e-2)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)

    def step() -> Tensor:
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        return (model.weight - before).abs().amax(1)

    assert step().min() > 0
    model.both = False
    # What is not written shows as NaN.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))
    moved = step()
    assert moved[:4].min() > 0 and (moved[4:] == 0).all()
