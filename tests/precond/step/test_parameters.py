"""Are parameters taken in every way people pass them, and do those without a gradient stay where they are?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precond import KFAC, SOAP, Loop
from tests.precond.test_torch_checks import METHODS, NAMES, Problem, equal

STEPS = 3


def trained(name: str, params: Callable[[nn.Module], Any] | None) -> Problem:
    problem = Problem(name, dtype=torch.float64)
    optimizer = problem.make(None if params is None else params(problem.model))
    for _ in range(STEPS):
        problem.step(optimizer)
    return problem


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "iterator": lambda m: m.parameters(),
    "named": lambda m: m.named_parameters(),
    "named list": lambda m: list(m.named_parameters()),
    "generator": lambda m: (p for p in m.parameters()),
    "group": lambda m: [{"params": m.parameters()}],
    "named group": lambda m: [{"params": m.named_parameters()}],
    "groups": lambda m: ({"params": p} for p in m.parameters()),
    "groups of named lists": lambda m: [{"params": [pair]} for pair in m.named_parameters()],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_way_is_the_same(name):
    expected = trained(name, lambda m: list(m.parameters())).values()
    for way, params in WAYS.items():
        if name == "MFAC" and way.startswith("groups"):
            continue  # whose groups are blocks of the curvature
        assert equal(trained(name, params).values(), expected), way


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].needs == "layers"])
def test_names_and_globs_are_taken_by_those_that_know_the_model(name):
    expected = trained(name, lambda m: list(m.parameters())).values()
    for way in (["weight", "bias"], ["*"], "*", [{"params": ["weight"]}, {"params": "b*"}]):
        assert equal(trained(name, lambda _, way=way: way).values(), expected), way
    assert equal(trained(name, None).values(), expected)


@pytest.mark.filterwarnings("ignore:.*has a gradient but no curvature yet:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_and_may_thaw(name):
    problem = Problem(name, dtype=torch.float64)
    problem.model.bias.requires_grad_(False)
    optimizer = problem.make(list(problem.model.named_parameters()))
    start = problem.values()
    problem.step(optimizer)
    assert torch.equal(problem.model.bias, start[1]) and not torch.equal(problem.model.weight, start[0])
    problem.model.bias.requires_grad_(True)
    for _ in range(4):
        problem.step(optimizer)
    assert not torch.equal(problem.model.bias, start[1])


@pytest.mark.filterwarnings("ignore:.*has a gradient but no curvature yet:UserWarning")  # for a step or two
@pytest.mark.parametrize("name", NAMES)
def test_parameters_frozen_in_the_middle_stay_whatever_is_left_of_their_gradient(name):
    problem = Problem(name, dtype=torch.float64)
    optimizer = problem.make(list(problem.model.parameters()))
    for _ in range(2):
        problem.step(optimizer)
    problem.model.bias.requires_grad_(False)
    for left in (torch.ones_like, torch.zeros_like):
        problem.model.bias.grad = left(problem.model.bias)
        before = problem.values()
        problem.step(optimizer)
        assert torch.equal(problem.model.bias, before[1]) and not torch.equal(problem.model.weight, before[0])


@pytest.mark.parametrize("name", ["SOAP", "KFAC"])
def test_both_halves_of_a_step_beside_a_frozen_parameter(name):
    problem, whole = Problem(name, dtype=torch.float64), Problem(name, dtype=torch.float64)
    optimizer, twin = problem.make(problem.params), whole.make(whole.params)
    for p in (problem.model.bias, whole.model.bias):
        p.requires_grad_(False)
        p.grad = torch.ones_like(p)
    for given in (problem, whole):
        given.loss().backward()
    for group in (*optimizer.param_groups, *twin.param_groups):
        group["kl_clip"] = None  # which bounds whole steps alone
    optimizer.precondition()
    optimizer.step()
    twin.step()
    assert equal(problem.values(), whole.values()) and optimizer.steps == 1


class Odd(nn.Module):
    """A number, a vector, a stack of matrices and an empty tensor beside a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.number = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.vector = nn.Parameter(torch.linspace(0.5, 1, 4, dtype=torch.float64))
        self.stack = nn.Parameter(torch.linspace(-1, 1, 2 * 2 * 2 * 4, dtype=torch.float64).reshape(2, 2, 2, 4))
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))

    def forward(self, x):
        mixed = self.layer(x) * self.vector * self.number + self.stack.sum((0, 1, 2))
        return mixed + self.empty.sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_every_order_and_empty_and_unused_ones(name):
    problem = Problem(name, dtype=torch.float64)
    problem.model = model = Odd(problem.model)  # type: ignore[assignment]
    options = {"fisher": "exact"} if name == "NaturalGradient" else {}  # "mc" refuses what it cannot join
    optimizer = problem.make(list(model.parameters()), **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(4):
        problem.step(optimizer)
    for n, p in model.named_parameters():
        assert p.isfinite().all()
        assert torch.equal(p, before[n]) == (n in ("empty", "unused")), n


# Refusals


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    problem = Problem(name)
    with pytest.raises(ValueError, match=r"empty parameter list|params= is empty"):
        problem.make([])
    with pytest.raises(ValueError, match=r"empty parameter list|params= is empty"):
        problem.make(p for p in ())
    for p in problem.params:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"every parameter given to .* is frozen; call requires_grad_"):
        problem.make(problem.params)


def test_a_parameter_of_another_model_is_refused_also_later():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"a tensor of shape \(4, 5\), which is no trainable parameter of the model"):
        KFAC(model, nn.MSELoss(), lr=0.1, params=nn.Linear(5, 4).named_parameters())
    optimizer = KFAC(model, nn.MSELoss(), lr=0.1, params=["weight"])
    with pytest.raises(ValueError, match=r"a tensor of shape \(7,\), which is no trainable parameter"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": ["bias"]})
    assert optimizer.param_groups[1]["params"][0] is model.bias


def test_names_are_used_in_messages():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SOAP([("encoder.weight", weight)], loop=Loop(nonfinite="raise"))
    weight.grad = torch.full((2,), math.nan)
    with pytest.raises(FloatingPointError, match=r"1 of 1 parameters, the first: encoder.weight"):
        optimizer.step()
