"""Does work that is due every so many steps follow the clock of a parameter that is absent in some of them?"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import methods
from tests.precond.test_protocol import METHODS

LAYERED = [method.name for method in methods() if method.needs == "layers"]
#: Methods whose step on one parameter does not depend on the others.
ALONE = ["SOAP", "Shampoo", "KLShampoo", "GaLore", "SPlus", "PSGD", "Muon", "SOAPMuon", "Sophia", "AdaHessian"]
OPTIONS: dict[str, Any] = {
    "GaLore": {"rank": 2},
    "SPlus": {"vector_scale": 1.0},
    "Sophia": {"curvature_update_period": 4, "gamma": 0.5},
    "PSGD": {"curvature_update_period": 4},
    "AdaHessian": {},
    "Muon": {},
}


class Heads(nn.Module):
    """A body and heads, of which a batch uses one."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
            self.heads = nn.ModuleList([nn.Linear(5, 3) for _ in range(heads)])
            self.never = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.body(x))


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(12, 4, generator=g).double(), torch.randint(3, (12,), generator=g)


def train(model: Heads, optimizer: Any, steps: Any, task_of: Any) -> None:
    loss_fn = getattr(optimizer, "loss_fn", nn.CrossEntropyLoss())
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        if hasattr(optimizer, "closure_needed") and optimizer.closure_needed():
            optimizer.step(lambda x=x, y=y, step=step: loss_fn(model(x, task_of(step)), y))
        else:
            loss_fn(model(x, task_of(step)), y).backward()
            optimizer.step()


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("name", ALONE)
def test_a_head_used_in_turn_trains_as_it_would_alone(name: str, every: int) -> None:
    """Each head takes every so manieth step, at which the period of the whole would leave some out for ever."""
    options = OPTIONS.get(name, {"inverse_update_period": 4})
    together = Heads(every)
    together.body.requires_grad_(False)
    optimizer: Any = METHODS[name].cls(together.parameters(), lr=0.01, **options)
    train(together, optimizer, range(10 * every), lambda step: step % every)
    for task in range(every):
        alone = Heads(every)
        optimizer = METHODS[name].cls(alone.heads[task].parameters(), lr=0.01, **options)
        train(alone, optimizer, range(task, 10 * every, every), lambda step: step % every)
        for p, q, r in zip(*(m.heads[task].parameters() for m in (together, alone, Heads(every))), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
            assert not torch.equal(p, r), "the head has not moved"


@pytest.mark.parametrize("criterion", ["Sophia", "PSGD"])
def test_second_derivatives_are_taken_when_a_head_is_due(criterion: str) -> None:
    model, twice = Heads(3), []
    extra = {"criterion": "hessian"} if criterion == "PSGD" else {}
    optimizer: Any = METHODS[criterion].cls(model.heads.parameters(), lr=0.01, curvature_update_period=3, **extra)
    product = optimizer.hessian_product

    def counted(v: Any) -> Any:
        twice.append({name.split(".")[1] for name, p in model.named_parameters() if any(p is q for q in v)})
        return product(v)

    optimizer.hessian_product = counted
    train(model, optimizer, range(12), lambda step: step % 3)
    first, later = [{"0"}, {"1"}, {"2"}], [{"0"}, {"1"}, {"2"}]
    assert twice == first + later, "each head at its first step, and three of its own steps later"


@pytest.mark.parametrize("period", [2, 4])
@pytest.mark.parametrize("name", LAYERED)
def test_every_head_gets_its_statistics(name: str, period: int) -> None:
    """With heads in turn the steps at which statistics are due would always meet the same head."""
    model, loss_fn = Heads(2), nn.CrossEntropyLoss()
    layers = {"structure": "layer"} if name == "SMWNaturalGradient" else {}  # not one block for all
    optimizer: Any = METHODS[name].cls(
        model, loss_fn, lr=0.01, damping=0.5, curvature_update_period=period, inverse_update_period=1, **layers
    )
    known, armed = {0: 0, 1: 0}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the first step of a head, which has no curvature yet
        for step in range(12 * period):
            armed += optimizer.statistics.armed
            before = copy.deepcopy(model.state_dict())
            train(model, optimizer, [step], lambda step: step % 2)
            moved = {key.split(".")[1] for key, v in model.state_dict().items() if not torch.equal(v, before[key])}
            assert {str(step % 2)} <= moved
            seen = optimizer.statistics.collector.estimators
            for head in known:
                if known[head] == 0 and any(f"heads.{head}.weight" in block for block in seen):
                    known[head] = step + 1
    assert 0 < known[0] <= 1 and 0 < known[1] <= 4, f"the heads were seen at {known}"
    assert armed <= 24, "statistics were taken far more often than asked for"
    optimizer.detach()


def test_a_plain_loop_keeps_no_clock_and_a_resumed_run_continues() -> None:
    model, loss_fn = Heads(1), nn.CrossEntropyLoss()
    model.never.requires_grad_(False)
    plain: Any = METHODS["KFAC"].cls(model, loss_fn, lr=0.01, curvature_update_period=3)
    train(model, plain, range(7), lambda step: 0)
    assert not any("waited" in state for state in plain.state_dict()["state"].values())
    plain.detach()
    ends = []
    for stop in (9, 20):
        model = Heads(2)
        optimizer: Any = METHODS["KFAC"].cls(model, loss_fn, lr=0.01, curvature_update_period=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            train(model, optimizer, range(stop), lambda step: step % 2)
            if stop < 20:
                buffer = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), buffer)
                buffer.seek(0)
                saved = torch.load(buffer, weights_only=True)
                model = Heads(2)
                optimizer = METHODS["KFAC"].cls(model, loss_fn, lr=0.01, curvature_update_period=4)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                train(model, optimizer, range(stop, 20), lambda step: step % 2)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
