"""An error anywhere in a step leaves the optimizer as it was: the batch again gives what it would have given.

Up to the moment in which parameters move, and apart from that: no optimizer takes back half a move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from precond import (
    EKFAC,
    KBFGS,
    KFAC,
    SENG,
    SINGD,
    TNT,
    LevenbergMarquardt,
    NaturalGradient,
    QuadraticModel,
    SMWNaturalGradient,
)


class Fault(TorchDispatchMode):
    """Raises at one operation, counted from when ``left`` was set: memory runs out, or somebody stops the cell."""

    left = 0
    error: type[BaseException] = KeyboardInterrupt

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("simulated")
        return function(*args, **(kwargs or {}))


METHODS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "KFAC": lambda model, loss_fn: KFAC(model, loss_fn, lr=0.05),
    "KFAC, exact": lambda model, loss_fn: KFAC(model, loss_fn, lr=0.05, fisher="exact"),
    "KFAC, empirical": lambda model, loss_fn: KFAC(model, loss_fn, lr=0.05, fisher="empirical"),
    "EKFAC": lambda model, loss_fn: EKFAC(model, loss_fn, lr=0.05),
    "SMW": lambda model, loss_fn: SMWNaturalGradient(model, loss_fn, lr=0.05),
    "natural gradient": lambda model, loss_fn: NaturalGradient(model, loss_fn, lr=0.05),
    "SENG": lambda model, loss_fn: SENG(model, loss_fn, lr=0.05),
    "SINGD": lambda model, loss_fn: SINGD(model, loss_fn, lr=0.05),
    "TNT": lambda model, loss_fn: TNT(model, loss_fn, lr=0.05),
    "K-BFGS": lambda model, loss_fn: KBFGS(model, loss_fn, lr=0.05),
    "damping rule": lambda model, loss_fn: KFAC(model, loss_fn, lr=0.05, damping_rule=LevenbergMarquardt()),
    "quadratic model": lambda model, loss_fn: KFAC(model, loss_fn, lr=1.0, step_size=QuadraticModel(max_kl=0.1)),
}


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moving(optimizer: Any) -> list[Tensor]:
    """What changes together with the parameters: they and their momentum."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    momenta = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in own]
    return [t.detach().clone() for t in (*own, *momenta)]


def run(name: str, at: int, step_of_fault: int) -> str:
    """What became of four steps with an error at one operation of one of them, and the batch again."""
    torch.manual_seed(0)
    model, loss_fn, mode = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        nn.CrossEntropyLoss(),
        Fault(),
    )
    optimizer = METHODS[name](model, loss_fn)
    expected = None if at == 0 else RESULTS.setdefault(name, run(name, 0, 0))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)

        def once(x: Tensor = x, y: Tensor = y) -> None:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

        if at and step == step_of_fault:
            before, mode.left = moving(optimizer), at
            mode.error = (torch.OutOfMemoryError, KeyboardInterrupt)[at // 89 % 2]
            with mode, suppress(mode.error):
                once()
            if mode.left > 0:
                return "over"
            if not all(map(torch.equal, before, moving(optimizer))):
                return "moved"
        once()
    found = repr(parameters(model).tolist())
    return found if expected is None else "same" if found == expected else "other"


RESULTS: dict[str, str] = {}


def faults(name: str, stride: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for step_of_fault in (0, 2):
        for at in range(1, 10_000, stride):
            outcome = run(name, at, step_of_fault)
            if outcome == "over":
                break
            found[outcome] += 1
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_batch_again_is_the_batch(name: str) -> None:
    found = faults(name, stride=89)
    assert found["same"] > 5
    assert found["other"] == 0


def test_a_quadratic_model_that_is_interrupted_leaves_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = METHODS["quadratic model"](model, loss_fn)
    loss_fn(model(torch.ones(5, 4)), torch.arange(5) % 3).backward()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(forward_ad, "unpack_dual", stopped)
        optimizer.step()
    assert torch.is_grad_enabled()
    optimizer.step()


def stopped(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_the_batch_again_is_the_batch_after_every_operation(name: str) -> None:
    found = faults(name, stride=1)
    assert found["other"] == 0
    assert found["same"] > 100
