"""Layers that are deleted, replaced, added, unfrozen or compiled after the optimizer was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import EKFAC, KFAC, SENG, SINGD, SOAP, NaturalGradient, SecondOrderOptimizer

LOSS = nn.CrossEntropyLoss()
X, Y = torch.linspace(-1, 1, 24).reshape(6, 4).double(), torch.arange(6) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(X), Y).backward()
        optimizer.step()


def deleted(model: nn.Sequential) -> None:
    del model[2:4]


def replaced(model: nn.Sequential) -> None:
    model[4] = nn.Linear(5, 3).double()


def all_replaced(model: nn.Sequential) -> None:
    for i in (0, 2, 4):
        model[i] = nn.Linear(model[i].in_features, model[i].out_features).double()  # type: ignore[arg-type]


def parametrized(model: nn.Sequential) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[4])


METHODS: dict[str, Callable[[nn.Module], SecondOrderOptimizer]] = {
    "KFAC": lambda m: KFAC(m, LOSS, lr=0.1, fisher="exact"),
    "EKFAC": lambda m: EKFAC(m, LOSS, lr=0.1, inverse_update_period=2, fisher="exact"),
    "SINGD": lambda m: SINGD(m, LOSS, lr=0.1, fisher="exact"),
    "SENG": lambda m: SENG(m, LOSS, lr=0.1),
    "NaturalGradient": lambda m: NaturalGradient(m, LOSS, lr=0.1, fisher="exact"),
}
CHANGES = {"deleted": (deleted, "2.weight"), "replaced": (replaced, "4.weight"), "all": (all_replaced, "0.weight")}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_is_gone_is_named(name: str, change: str, first: int) -> None:
    model = network()
    optimizer = METHODS[name](model)
    train(model, optimizer, first)
    alter, gone = CHANGES[change]
    alter(model)
    with pytest.raises(
        RuntimeError, match=rf"^{name} was made for {gone}, .*which the model no longer has: a layer was"
    ):
        train(model, optimizer, 1)


def test_a_weight_that_is_parametrized_later_is_named() -> None:
    model = network()
    optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact")
    parametrized(model)
    with pytest.raises(
        RuntimeError, match=r"KFAC was made for 4\.weight, which the model no longer has: .*parametrized"
    ):
        train(model, optimizer, 1)


@pytest.mark.parametrize("period", [1, 10])
@pytest.mark.parametrize("first", [0, 4])
def test_a_layer_that_came_later_is_told_once_and_can_be_added(first: int, period: int) -> None:
    """And has curvature in its first step, whenever statistics are due."""
    model = network()
    optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact", curvature_update_period=period)
    train(model, optimizer, first)
    model.append(nn.Linear(3, 3).double())
    with pytest.warns(UserWarning, match=r"KFAC does not train 5\.weight, 5\.bias: added to the model, or unfrozen"):
        train(model, optimizer, 1)
    train(model, optimizer, 6)  # and warnings are errors
    optimizer.add_param_group({"params": [*model[5].parameters()]})
    before = model[5].weight.detach().clone()  # type: ignore[operator]
    train(model, optimizer, 1)
    assert not torch.equal(model[5].weight, before)  # type: ignore[arg-type]


def test_a_layer_that_was_added_has_its_curvature_after_a_skipped_step_and_after_a_checkpoint() -> None:
    def added(steps: int) -> tuple[nn.Sequential, KFAC]:
        model = network()
        optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact", curvature_update_period=10)
        train(model, optimizer, steps)
        model.append(nn.Linear(3, 3).double())
        optimizer.add_param_group({"params": [*model[5].parameters()]})
        return model, optimizer

    model, optimizer = added(3)
    resumed, other = added(0)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for each, its in ((model, optimizer), (resumed, other)):
        its.zero_grad()
        LOSS(each(X), Y).backward()
        each[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr, operator]
        with pytest.warns(RuntimeWarning, match="skips a step"):
            its.step()
        train(each, its, 1)
        assert its.preconditioners["5.weight+5.bias"].inverse is not None
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_layer_that_was_unfrozen_later_is_told_and_one_that_was_left_out_is_not() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact", params=["4.*"])
    train(model, optimizer, 2)  # 2.weight was left out on purpose
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"KFAC does not train 0\.weight, 0\.bias:"):
        train(model, optimizer, 3)


def test_heads_in_turn_and_frozen_layers_are_no_missing_ones() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, first: bool) -> Tensor:
            return (self.a if first else self.b)(self.body(x).tanh())

    model = Two().double()
    optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact")
    for number in range(6):
        optimizer.zero_grad()
        LOSS(model(X, number % 2 == 0), Y).backward()
        optimizer.step()
    model.body.requires_grad_(False)
    optimizer.zero_grad()
    LOSS(model(X, True), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("make", [METHODS["KFAC"], lambda model: SOAP(model.parameters(), lr=0.1)])
def test_steps_without_any_gradient_are_told_once(make: Any) -> None:
    model, other = network(), network()
    optimizer = make(model)

    def empty(steps: int) -> None:
        for _ in range(steps):
            LOSS(other(X), Y).backward()
            optimizer.step()

    empty(2)
    with pytest.warns(RuntimeWarning, match=r"no parameter had a gradient in the last 3 steps, so nothing was trained"):
        empty(1)
    empty(5)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    empty(2)  # counts from the start again


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*lru_cache")  # of the compiler
@pytest.mark.parametrize("first", [0, 2])
def test_a_layer_that_is_compiled_later_is_trained_alike_under_its_old_name(first: int) -> None:
    torch.compiler.reset()
    flat, tables = [], []
    for compiled in (True, False):
        model = network()
        optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact")
        train(model, optimizer, first)
        if compiled:
            model[2] = torch.compile(model[2], backend="eager")  # type: ignore[assignment]
        train(model, optimizer, 3)
        flat.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        tables.append([(row.parameter, row.structure) for row in optimizer.coverage()])
    torch.compiler.reset()
    assert torch.allclose(*flat, rtol=1e-10, atol=1e-12)
    assert tables[0] == tables[1]
