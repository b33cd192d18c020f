"""A loss of one's own in a training loop: called as it is, by a name or as a module, with what it must not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.losses import AutogradLoss, CrossEntropy
from precond import EKFAC, KFAC, HessianFree, NaturalGradient, Sophia, TrustRegion


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, y[:, None]).mean()


class ByHand(nn.Module):
    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return by_hand(z, y)


def made() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        return model, [(torch.randn(6, 3).double(), torch.randint(3, (6,))) for _ in range(3)]


def trained(make: Callable[..., Any], loss_fn: Any, call: Any = None, closure: bool = False) -> list[Tensor]:
    model, data = made()
    optimizer = make(model, loss_fn)
    call = call or loss_fn
    for x, y in data:
        if closure:

            def value(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                return call(model(x), y)

            optimizer.step(value)
        else:
            optimizer.zero_grad()
            call(model(x), y).backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


#: A loss of one's own has no level to be followed: nothing says that it is zero for a perfect fit.
NUMBERS: dict[str, Any] = {"damping": 1e-2, "kl_clip": TrustRegion(1e-2, lr=0.1)}
LAYERWISE: dict[str, Callable[..., Any]] = {
    "KFAC": lambda model, loss: KFAC(model, loss, lr=0.05, fisher="exact", **NUMBERS),
    "EKFAC": lambda model, loss: EKFAC(model, loss, lr=0.05, fisher="exact", **NUMBERS),
    "empirical": lambda model, loss: KFAC(model, loss, lr=0.05, fisher="empirical", **NUMBERS),
    "NaturalGradient": lambda model, loss: NaturalGradient(model, loss, lr=0.05, fisher="exact", **NUMBERS),
}


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("form", ["function", "module", "module called", "ours", "ours, module called"])
def test_the_run_is_that_of_the_loss_it_equals(method: str, form: str) -> None:
    expected = trained(LAYERWISE[method], nn.CrossEntropyLoss())
    call: Any = None
    if form == "function":
        loss: Any = AutogradLoss(by_hand, reduction="mean")
    elif form.startswith("module"):
        inner: nn.Module = ByHand()
        loss, call = AutogradLoss(inner), inner if "called" in form else None
    else:
        inner = nn.CrossEntropyLoss()
        loss, call = CrossEntropy(inner), inner if "called" in form else None
    for got, p in zip(trained(LAYERWISE[method], loss, call), expected, strict=True):
        torch.testing.assert_close(got, p, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [AutogradLoss(by_hand, reduction="mean"), CrossEntropy(nn.CrossEntropyLoss())],
    ids=["a function", "cross-entropy"],
)
def test_closures(loss: Any) -> None:
    def hessian_free(model: nn.Module, loss_fn: Any) -> Any:
        return HessianFree(model, loss_fn, preconditioner=False)  # which is drawn

    expected = trained(hessian_free, nn.CrossEntropyLoss(), closure=True)
    for got, p in zip(trained(hessian_free, loss, closure=True), expected, strict=True):
        torch.testing.assert_close(got, p, rtol=1e-5, atol=1e-8)
    assert trained(lambda model, _: Sophia(model.parameters()), loss, closure=True)


def test_a_function_that_nobody_sees_is_refused_with_what_to_call() -> None:
    with pytest.raises(
        TypeError, match=r"what is estimated for by_hand depends on targets .* Call the loss module that"
    ):
        trained(LAYERWISE["KFAC"], AutogradLoss(by_hand, reduction="mean"), by_hand)


def test_a_penalty_in_the_loss_is_refused_with_the_way_that_works() -> None:
    model, ((x, y), *_) = made()
    loss = AutogradLoss(lambda z, t: by_hand(z, t) + 0.1 * model[0].weight.square().sum(), reduction="mean")
    optimizer = KFAC(model, loss, lr=0.05, fisher="exact", **NUMBERS)
    with pytest.raises(ValueError, match=r"other than through the model's output.*optimizers take weight_decay="):
        loss(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("method", [*LAYERWISE, "in units of the loss"])
def test_a_part_of_a_step_without_targets_counts_nothing(method: str, reduction: str) -> None:
    """Torch's gradient of it is zero, although its mean is 0/0."""
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    runs = []
    for nothing in (None, "before", "after"):
        model, data = made()
        make = LAYERWISE.get(method, lambda model, loss: KFAC(model, loss, lr=0.05, fisher="exact"))
        optimizer = make(model, copy.deepcopy(loss_fn))
        ignored = torch.full((6,), -100)
        for x, y in data:
            optimizer.zero_grad()
            parts = {None: [y], "before": [ignored, y], "after": [y, ignored]}[nothing]
            for part in parts:
                optimizer.loss_fn(model(x), part).backward()
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    for run in runs[1:]:
        for got, expected in zip(run, runs[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)
