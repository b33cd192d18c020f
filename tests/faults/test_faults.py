"""What becomes of a run that meets a fault: it survives bit for bit, or is refused in words; never anything else.

``python -m tests.faults`` prints the table of all of them.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from precond import SOAP
from tests.faults.injection import METHODS, At, Run, injections, same

#: At least so many faults are put into every method by the long form.
LONG = 70


def outcomes(name: str, long: bool) -> Counter[str]:
    found: Counter[str] = Counter()
    bad = []
    for kind, outcome in injections(name, long):
        found[outcome] += 1
        bad += [f"{kind}: {outcome}"] if outcome in ("silent", "unclear") else []
    assert bad == []
    return found


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_fault_is_survived_or_refused(name: str) -> None:
    found = outcomes(name, long=False)
    assert found["survived"] >= 3 and found["refused"] >= 1


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_fault_is_survived_or_refused(name: str) -> None:
    found = outcomes(name, long=True)
    assert found.total() >= LONG and LONG * len(METHODS) >= 1500
    assert found["survived"] > 30 and found["refused"] > 10


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"KBFGS"}))
def test_the_step_again_needs_no_new_backward_pass(name: str) -> None:
    run, other = Run(name).steps(0), Run(name).steps(0)
    mode = At()
    run.backward(1), other.backward(1)
    with mode.after(60, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run.move(1)
    run.move(1), other.move(1)
    assert same(run.values(), other.values())


def test_a_group_that_cannot_be_added_is_not_added() -> None:
    layer, complex_one = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = SOAP(layer.parameters())
    before = optimizer.state_dict()
    with pytest.raises(TypeError, match="is complex"):
        optimizer.add_param_group({"params": [complex_one]})
    assert optimizer.state_dict() == before and len(optimizer.schedules) == 1


def test_a_closure_that_raises_when_it_is_called_again_leaves_everything() -> None:
    run = Run("HessianFree").steps(0)
    run.optimizer.zero_grad()
    before, drawn, interrupted = run.held(), [], False

    def closure() -> torch.Tensor:
        nonlocal interrupted
        drawn.append(float(torch.rand(())))  # as dropout draws
        if len(drawn) == 2 and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        return run.loss(1)

    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step(closure)
    assert same(before, run.held()) and all(p.grad is None for p in run.model.parameters())
    first = list(drawn)
    drawn.clear()
    run.optimizer.step(closure)
    assert drawn[:2] == first  # the stream of random numbers began where it had begun
    assert same(run.values(), Run("HessianFree").steps(0, 1).values())


def test_a_state_with_nan_is_named_and_stops_the_run() -> None:
    run = Run("SOAP").steps(0, 1)
    first = next(iter(run.model.parameters()))
    run.optimizer.state[first]["exp_avg"][0, 0] = torch.nan
    before = run.values()
    with pytest.warns(RuntimeWarning, match=r"own state holds NaN or inf, in state\[0\]\['exp_avg'\]"):
        run.once(2)
    assert same(before, run.values())


def test_another_models_state_is_refused_with_the_shapes() -> None:
    for name, words in (("SOAP", r"is \(8, 5\), and \(6, 5\) is expected"), ("KFAC", r"is of another shape")):
        with pytest.raises(ValueError, match=words):
            Run(name).steps(0).optimizer.load_state_dict(Run(name, width=8).steps(0).optimizer.state_dict())
    with pytest.raises(ValueError, match="state of another method, Muon"):
        Run("SOAP").steps(0).optimizer.load_state_dict(Run("Muon").steps(0).optimizer.state_dict())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_model_goes_on_in_another_precision(name: str) -> None:
    run = Run(name, dtype=torch.float32).steps(0, 1, 2)
    for dtype in (torch.float64, torch.float32):
        run.model.to(dtype)
        run.dtype = dtype
        before = run.values()
        run.steps(3, 4, 5)
        assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in run.values())
        assert not same(before, run.values())
