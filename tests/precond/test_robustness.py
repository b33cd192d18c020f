"""Does every method survive what happens in real runs, and say so where it cannot go on?"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond.gradient.matrices
import precond.layerwise.blocks.preconditioner
from curvature.structures.inverse import InverseEstimator
from precond import SOAP, GaLore, KLShampoo, Loop, Shampoo, SOAPMuon, SPlus
from solvers import SolverError
from tests.precond.test_torch_checks import METHODS, NAMES, WITHOUT_CLOSURE, Problem, equal


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)


def finite(problem: Problem, optimizer: torch.optim.Optimizer) -> bool:
    found = [*problem.params, *tensors(optimizer.state_dict()["state"])]
    return all(bool(t.isfinite().all()) for t in found)


def make(name: str, **options: Any) -> tuple[Problem, torch.optim.Optimizer]:
    problem = Problem(name, dtype=torch.float64)
    return problem, problem.make(**options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zero", "rank one", "small", "large", "one example", "constant"])
def test_degenerate_batches(name, kind):
    problem, optimizer = make(name)
    with torch.no_grad():
        if kind in ("small", "large"):
            problem.model.weight.zero_(), problem.model.bias.zero_()
            problem.y = problem.y * (1e-30 if kind == "small" else 1e30)
        elif kind == "zero":
            problem.y = problem.model(problem.x)
        elif kind == "rank one":
            problem.x = problem.x[:1].expand(8, 5) * problem.x[:, :1]
            problem.y = problem.model(problem.x) + problem.y[:1] * problem.x[:, :1]
        elif kind == "one example":
            problem.x, problem.y = problem.x[:1], problem.y[:1]
        else:
            problem.x = torch.ones_like(problem.x)
    for _ in range(4):
        problem.step(optimizer)
        assert finite(problem, optimizer)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_gradients_whose_squares_leave_float32(name, scale):
    """Squares of 1e30 overflow, those of 1e-30 vanish: a step may be skipped or refused, aloud, but nothing breaks."""
    problem = Problem(name)
    optimizer = problem.make()
    with torch.no_grad():
        problem.model.weight.zero_(), problem.model.bias.zero_()
        problem.y = problem.y * scale
    before, said = problem.values(), []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                problem.step(optimizer)
            except (FloatingPointError, SolverError) as error:
                said.append(error)
        said += warned
        assert finite(problem, optimizer)
    moved = not equal(problem.values(), before)
    # A bound on steps holds them at zero where the predicted change overflows.
    bounded = any(group["kl_clip"] for group in optimizer.param_groups)
    assert moved or said or bounded or scale < 1, "nothing moved, and nothing was said"
    # The next steps are as if nothing had been.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        problem.model.weight.copy_(torch.randn(4, 5, generator=generator)), problem.model.bias.zero_()
        problem.y = torch.randn(8, 4, generator=generator)
    before = problem.values()
    for _ in range(4):
        problem.step(optimizer)
    assert finite(problem, optimizer) and not equal(problem.values(), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_never_enters_the_state(name, bad):
    (problem, optimizer), (twin, clean) = make(name), make(name)
    for step in range(6):
        if step == 3:
            good, before = problem.x, copy.deepcopy(optimizer.state_dict())
            problem.x = good.clone()
            problem.x[2, 1] = bad
            with pytest.warns(RuntimeWarning, match=r"skips a step \(1 so far\): a gradient holds NaN or inf"):
                problem.step(optimizer)
            assert equal(optimizer.state_dict(), before)
            problem.x = good
        problem.step(optimizer)
        twin.step(clean)
    assert equal(problem.values(), twin.values()), "the steps after it are not what they would have been"
    assert equal(optimizer.state_dict()["state"], clean.state_dict()["state"])


@pytest.mark.parametrize("name", NAMES)
def test_bad_batches_without_end_stop_the_run(name):
    problem, optimizer = make(name, loop=Loop(max_skips=3))
    problem.step(optimizer)
    good, problem.x = problem.x, torch.full_like(problem.x, math.nan)
    before = problem.values()
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="skips a step"):
            problem.step(optimizer)
    with pytest.raises(FloatingPointError, match=r"skipped 3 steps in a row.*all parameters are finite, so look at"):
        problem.step(optimizer)
    assert equal(problem.values(), before)
    # A good step begins the count anew.
    problem.x = good
    problem.step(optimizer)
    assert optimizer.skipped == 3 and optimizer.skipped_in_row == 0


@pytest.mark.parametrize("name", ["SOAP", "KFAC", "Newton"])
def test_broken_parameters_are_named(name):
    problem, optimizer = make(name, loop=Loop(max_skips=1))
    problem.model.bias.data[1] = math.nan
    which = "bias is" if METHODS[name].needs == "layers" else r"parameter 1 of group 0, shape \(4,\) is"
    with pytest.raises(FloatingPointError, match=f"{which} itself not finite, .* go back to a checkpoint"):
        problem.step(optimizer)


def test_what_a_gradient_scaler_skips_is_not_counted():
    p = nn.Parameter(torch.ones(2))
    optimizer = SOAP([p], loop=Loop(max_skips=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale((p * 1e36).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped == optimizer.skipped_in_row == 0 and p.eq(1).all()


class Branches(nn.Module):
    """Two layers, of which the second is used in some steps."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first, self.second, self.both = first, nn.Linear(4, 4, dtype=torch.float64), True
        nn.init.eye_(self.second.weight), nn.init.constant_(self.second.bias, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if self.both else x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("used", [[1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1]], ids=["from the start", "later"])
def test_a_layer_that_is_unused_in_some_steps(name, used):
    problem = Problem(name, dtype=torch.float64)
    problem.model = model = Branches(problem.model)  # type: ignore[assignment]
    # Springs move on without a slope, and Sophia waits for its first estimate.
    options = {"GaussNewton": {"spring": 0.0}, "Sophia": {"curvature_update_period": 1}}.get(name, {})
    optimizer = problem.make(list(model.parameters()), **options)
    with warnings.catch_warnings():
        # A layer that comes when no statistics are taken has its plain gradient once, and that is said.
        warnings.filterwarnings("ignore", ".*has a gradient but no curvature yet", UserWarning)
        for both in used:
            model.both = bool(both)
            first, second = model.first.weight.detach().clone(), model.second.weight.detach().clone()
            problem.step(optimizer)
            assert not torch.equal(model.first.weight, first)
            assert torch.equal(model.second.weight, second) == (not both), "moved without a gradient, or not with one"
    assert all(p.isfinite().all() for p in model.parameters())


# Decompositions that fail

DECOMPOSED = {
    "Shampoo": (lambda p: Shampoo(p, inverse_update_period=2), "0.root.0", "spectrum"),
    "SOAP": (lambda p: SOAP(p, inverse_update_period=2), "basis.0", "improved_basis"),
    "SOAPMuon": (lambda p: SOAPMuon(p, inverse_update_period=2), "basis.0", "improved_basis"),
    "KLShampoo": (lambda p: KLShampoo(p, inverse_update_period=2), "basis.0", "improved_basis"),
    "SPlus": (lambda p: SPlus(p, inverse_update_period=2), "basis.0", "spectrum"),
    "GaLore": (lambda p: GaLore(p, rank=2, inverse_update_period=2), "projection", "leading_vectors"),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_failed_decomposition_keeps_the_last_one_and_says_so(name, monkeypatch, caplog):
    make_optimizer, entry, routine = DECOMPOSED[name]
    weight = nn.Parameter(torch.eye(4, 3, dtype=torch.float64))
    optimizer = make_optimizer([("weight", weight)])

    def step(seed: int) -> None:
        weight.grad = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    for seed in range(3):
        step(seed)
    good, before = optimizer.state[weight][entry].clone(), weight.detach().clone()

    def fails(*_: Any, **__: Any) -> Any:
        raise SolverError("the routine did not converge")

    for module in (getattr(precond.gradient, m) for m in ("matrices", "bases", "shampoo", "galore")):
        if hasattr(module, routine):
            monkeypatch.setattr(module, routine, fails)
    with caplog.at_level(logging.WARNING):
        for seed in range(3, 9):  # refreshes at steps 4, 6 and 8 fail
            step(seed)
    assert caplog.text.count("weight") == 3 and "keeps its last decomposition" in caplog.text
    assert torch.equal(optimizer.state[weight][entry], good)
    assert not torch.equal(weight, before) and weight.isfinite().all()
    with pytest.raises(SolverError, match=r"^weight.*refresh failed 4 times in a row.*did not converge"):
        step(9)
    monkeypatch.undo()
    step(9)
    step(10)
    step(11)
    assert not torch.equal(optimizer.state[weight][entry], good)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs == "layers"])
def test_a_failed_inverse_of_a_block_keeps_the_last_one_and_says_so(name, monkeypatch, caplog):
    problem, optimizer = make(name, curvature_update_period=1, inverse_update_period=1)
    for _ in range(3):
        problem.step(optimizer)
    (block,) = optimizer.preconditioners
    preconditioner = optimizer.preconditioners[block]

    def fails(*_: Any, **__: Any) -> Any:
        raise SolverError("the routine did not converge")

    learns_inverse = isinstance(preconditioner.estimator, InverseEstimator)
    if learns_inverse:
        monkeypatch.setattr(type(preconditioner.estimator), "improve", fails)
    else:
        monkeypatch.setattr(precond.layerwise.blocks.preconditioner, "power", fails)
    before, good = problem.values(), preconditioner.inverse
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            problem.step(optimizer)
    assert caplog.text.count(f"block {block} keeps its last inverse: the routine did not converge") == 3
    assert preconditioner.inverse is good or learns_inverse
    assert not equal(problem.values(), before) and finite(problem, optimizer)
    before = problem.values()
    with pytest.raises(SolverError, match=rf"^block {re.escape(block)}: no inverse \(4 failures in a row\)"):
        problem.step(optimizer)
    assert equal(problem.values(), before)
    monkeypatch.undo()
    problem.step(optimizer)
    assert preconditioner.failures == 0 and not equal(problem.values(), before)


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_gradients_may_be_none_at_first_and_between(name):
    problem, optimizer = make(name)
    optimizer.step()
    assert optimizer.steps == 0
    problem.step(optimizer)
    before = problem.values()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.steps == 1 and equal(problem.values(), before)
    problem.step(optimizer)
    assert not equal(problem.values(), before)
