"""An empirical Fisher comes from the user's own backward pass, whatever the loss was multiplied by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvature
from precond import EKFAC, KFAC, KroneckerFisher

Backward = Callable[[nn.Module, nn.Module, Tensor, Tensor], None]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 4)).double()


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=g, dtype=torch.float64), torch.randint(4, (8,), generator=g)


def whole(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> None:
    loss_fn(net(x), y).backward()


def scaled(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> None:
    (1024 * loss_fn(net(x), y)).backward()


def accumulated(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> None:
    for i in range(4):
        (loss_fn(net(x[i::4]), y[i::4]) / 4).backward()


def check(optimizer: KFAC | EKFAC, reference: object, weight: float = 1.0) -> None:
    estimates = {name: p.estimator.operator().to_dense() / weight for name, p in optimizer.preconditioners.items()}
    for block, place in zip(reference.blocks, reference.places, strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(estimates[place.block.name], block.to_dense(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backward", [whole, scaled, accumulated])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_statistics_are_those_of_the_data_set(backward: Backward, reduction: str) -> None:
    net, (x, y) = model(), batch()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    optimizer = KFAC(net, loss_fn, lr=0.1, fisher="empirical", curvature_ema=0.0)
    for _ in range(2):  # by a pass of its own, then by the user's
        optimizer.zero_grad()
        backward(net, loss_fn, x, y)
        optimizer.precondition()
    weight = 1024.0 if backward is scaled and reduction == "mean" else 1.0  # a sum stands for its mean
    check(optimizer, curvature.fisher(net, nn.CrossEntropyLoss(), (x, y), kind="empirical", structure="kfac"), weight)


def test_masked_examples_do_not_count() -> None:
    net, (x, y) = model(), batch()
    y[::3] = -100
    optimizer = KFAC(net, loss_fn := nn.CrossEntropyLoss(), lr=0.1, fisher="empirical")
    for _ in range(2):
        optimizer.zero_grad()
        whole(net, loss_fn, x, y)
        optimizer.precondition()
    check(optimizer, curvature.fisher(net, loss_fn, (x, y), kind="empirical", structure="kfac"))


def count_passes(run: Callable[[], None]) -> int:
    """How often autograd.grad is called while ``run`` runs."""
    calls, original = [], torch.autograd.grad

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counting)
        run()
    return len(calls)


def test_no_pass_of_its_own_is_run() -> None:
    net, (x, y) = model(), batch()
    optimizer = KFAC(net, loss_fn := nn.CrossEntropyLoss(), lr=0.1, fisher="empirical")
    assert count_passes(lambda: whole(net, loss_fn, x, y)) > 0  # the first pass is looked at closely
    optimizer.step()
    optimizer.zero_grad()
    assert count_passes(lambda: whole(net, loss_fn, x, y)) == 0
    before = optimizer.preconditioners["0.weight+0.bias"].estimator.operator().to_dense()
    optimizer.step()
    assert not torch.equal(before, optimizer.preconditioners["0.weight+0.bias"].estimator.operator().to_dense())


def test_two_losses_on_one_pass_are_kept_apart() -> None:
    """The curvature of a sum of two losses is the sum of theirs; their gradients would arrive as one."""
    net, (x, y) = model(), batch()
    other = (y + 1) % 4
    separate = KroneckerFisher("empirical", bias="separate")
    optimizer = KFAC(net, loss_fn := nn.CrossEntropyLoss(), lr=0.1, fisher=separate)
    optimizer.curvature_ema = 0.0
    for _ in range(2):
        optimizer.zero_grad()
        z = net(x)
        (loss_fn(z, y) + loss_fn(z, other)).backward()
        optimizer.precondition()
    first, second = (
        curvature.fisher(net, loss_fn, (x, target), kind="empirical", structure="kfac", bias="separate")
        for target in (y, other)
    )
    for a, b, place in zip(first.blocks, second.blocks, first.places, strict=True):  # type: ignore[attr-defined]
        estimate = optimizer.preconditioners[place.block.name].estimator.operator().to_dense()
        torch.testing.assert_close(estimate, a.to_dense() + b.to_dense(), rtol=1e-10, atol=1e-14)


class Routed(nn.Module):
    """Keeps activations for penalties, and may compute one on weights in its forward pass."""

    def __init__(self, multiplies: bool) -> None:
        super().__init__()
        self.multiplies = multiplies
        self.first, self.router, self.last = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.input = x.requires_grad_()
        self.inner = self.first(x).tanh()
        self.logits = self.router(self.inner)
        if self.multiplies:
            self.product = nn.functional.linear(self.first.weight.T, self.router.weight)
        self.output = self.last(self.inner * self.logits.softmax(-1))
        return self.output


#: What a loop adds to the loss; where the empirical Fisher nevertheless comes from the user's own pass.
PENALTIES: dict[str, tuple[Callable[[Routed, Tensor], Tensor], bool]] = {
    "decay": (lambda net, loss: sum(p.square().sum() for p in net.parameters()), True),  # type: ignore[arg-type]
    "z-loss": (lambda net, loss: net.logits.logsumexp(-1).square().mean(), False),
    "activations": (lambda net, loss: net.inner.square().sum(), False),
    "logits": (lambda net, loss: net.output.square().mean(), False),
    "weights inside": (lambda net, loss: net.product.square().sum(), False),
    "slopes": (
        lambda net, loss: torch.autograd.grad(loss, net.input, create_graph=True)[0].square().sum(),
        False,
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("first", [False, True], ids=["loss first", "penalty first"])
def test_penalties_are_left_out(name: str, first: bool) -> None:
    """As every other curvature leaves them out: it is that of the calls of the loss."""
    torch.manual_seed(0)
    net, (x, y) = Routed(name == "weights inside").double(), batch()
    optimizer = KFAC(net, loss_fn := nn.CrossEntropyLoss(), lr=0.1, fisher="empirical", curvature_ema=0.0)
    penalty, waits = PENALTIES[name]
    passes = 0
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_fn(net(x), y)
        more = 0.1 * penalty(net, loss)
        total = more + loss if first else loss + more
        passes = count_passes(total.backward)
        optimizer.precondition()
    assert (passes == 0) == waits
    check(optimizer, curvature.fisher(net, loss_fn, (x, y), kind="empirical", structure="kfac"))
