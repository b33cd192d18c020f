"""Does each parameter's rate follow the sign of the slope along its last direction, as the formula says?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from precond import PSGD, SOAP, AdaptiveRate, GaLore, KLShampoo, Muon, Shampoo, SOAPMuon, SPlus

METHODS = {cls.__name__: cls for cls in (SOAP, Muon, Shampoo, KLShampoo, SPlus, SOAPMuon, PSGD, GaLore)}
SHAPES = ((5, 4), (5, 4), (6,), (90, 3), (2, 2, 3))
LR, STEPS = 0.5, 12
#: The schedule: factors of the learning rate, which has its peak in between.
SCHEDULE = [min(1.0, (t + 1) / 3) * (1 - t / STEPS) / 0.75 for t in range(STEPS)]


def all_gradients() -> list[list[np.ndarray]]:
    """Of each step: noise around one direction, then around the opposite one, so that rates rise and fall."""
    rng = np.random.default_rng(0)
    mean = [rng.standard_normal(shape) for shape in SHAPES]
    return [[(1 if t < 7 else -1) * m + 1.5 * rng.standard_normal(m.shape) for m in mean] for t in range(STEPS)]


def trained(make, **options) -> tuple[list[list[np.ndarray]], torch.optim.Optimizer, list[nn.Parameter]]:
    """What each step takes off each parameter, of gradients that do not depend on where the parameters are."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = make(params, lr=LR, **options)
    moves = []
    for gradients, factor in zip(all_gradients(), SCHEDULE, strict=True):
        moves.append(step(optimizer, params, gradients, factor))
    return moves, optimizer, params


def step(optimizer, params, gradients, factor) -> list[np.ndarray]:
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = factor * LR
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g)
    optimizer.step()
    return [(b - p.detach()).numpy() for p, b in zip(params, before, strict=True)]


def factors_of(moves: list[list[np.ndarray]], growth: float, least: float, most: float) -> np.ndarray:
    """Factors ``(steps, parameters)`` from the definition, number by number, of what a step without them takes off."""
    out = np.ones((STEPS, len(SHAPES)))
    for i in range(len(SHAPES)):
        factor = 1.0
        for t, gradients in enumerate(all_gradients()):
            if t:
                slope = sum(float(g) * float(d) for g, d in zip(gradients[i].flat, moves[t - 1][i].flat, strict=True))
                factor *= growth ** (min(1.0, SCHEDULE[t]) * (1 if slope > 0 else -1))
                factor = min(max(factor, 1 / most), most)
            out[t, i] = max(factor, least)
    return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("numbers", [(1.5, 1.0, 4.0), (1.2, 0.5, 100.0)])
def test_factors_are_those_of_the_definition(name, numbers):
    plain, ours = (
        trained(METHODS[name], adaptive_rate=None)[0],
        trained(METHODS[name], adaptive_rate=AdaptiveRate(*numbers))[0],
    )
    factors = factors_of(plain, *numbers)
    for t in range(STEPS):
        for i in range(len(SHAPES)):
            np.testing.assert_allclose(ours[t][i], factors[t, i] * plain[t][i], rtol=1e-9, atol=1e-12)
    assert factors.max() > 2 and (np.diff(factors, axis=0) < 0).any()
    assert len(np.unique(factors[-1])) > 1  # they differ by parameter


def test_a_group_may_keep_its_rate_and_kinds_have_factors_of_their_own_beside_it():
    def grouped(params, lr, **options):
        first, *others = params
        return SOAP([{"params": [first], "adaptive_rate": None}, {"params": others}], lr=lr, **options)

    plain, (ours, optimizer, params) = (
        trained(SOAP, adaptive_rate=None)[0],
        trained(grouped, adaptive_rate=AdaptiveRate(2.0)),
    )
    factors = factors_of(plain, 2.0, 1.0, 10.0)
    factors[:, 0] = 1
    for t in range(STEPS):
        for i in range(len(SHAPES)):
            np.testing.assert_allclose(ours[t][i], factors[t, i] * plain[t][i], rtol=1e-9, atol=1e-12)
    assert "rate" not in optimizer.state[params[0]] and optimizer.state[params[1]]["rate"] == factors[-1, 1]


@pytest.mark.parametrize("name", ["SOAP", "Muon"])
def test_a_resumed_run_goes_on_bit_for_bit(name):
    def resumed(params, lr, **options):
        return METHODS[name](params, lr=lr, **options)

    options = {"adaptive_rate": AdaptiveRate(1.5)}
    _, optimizer, params = trained(resumed, **options)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    second = resumed(copies, LR, **options)
    second.load_state_dict(optimizer.state_dict())
    for gradients in all_gradients()[:3]:
        step(optimizer, params, gradients, 0.5)
        step(second, copies, gradients, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_a_state_from_before_goes_on_at_its_own_rate():
    _, old, params = trained(SOAP, adaptive_rate=None)
    saved = old.state_dict()
    for name in ("rate_growth", "rate_least", "rate_most"):
        del saved["param_groups"][0][name]
    new = SOAP(params, lr=LR, adaptive_rate=AdaptiveRate())
    new.load_state_dict(saved)
    step(new, params, all_gradients()[0], 1.0)
    assert new.param_groups[0]["rate_growth"] == 1 and "rate" not in new.state[params[0]]


def test_zero_gradients_and_rates_that_begin_at_zero_leave_the_factors():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([p], lr=torch.tensor(0.0), adaptive_rate=AdaptiveRate())
    for lr, g in ((0.1, 0.0), (0.1, 1.0), (0.0, 1.0), (0.1, 1.0)):
        optimizer.param_groups[0]["lr"].fill_(lr)
        p.grad = torch.full_like(p, g)
        optimizer.step()
    factor = optimizer.state[p]["rate"].item()
    assert factor == pytest.approx(1.1**2) and bool(p.isfinite().all())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: SOAP(p, adaptive_rate=1.1), TypeError, r"adaptive_rate is an AdaptiveRate\(growth, least, most\)"),
        (lambda p: AdaptiveRate(1.0), ValueError, "growth of AdaptiveRate"),
        (lambda p: AdaptiveRate(least=2.0), ValueError, "least of AdaptiveRate"),
        (lambda p: AdaptiveRate(most=0.5), ValueError, "most of AdaptiveRate"),
    ],
)
def test_what_is_no_rate_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make([nn.Parameter(torch.ones(2, 2))])


@pytest.mark.parametrize(("name", "growth"), [("SOAP", 1.1), ("Muon", 1.2), ("PSGD", 1.1), ("Shampoo", 1.0)])
def test_who_has_one_by_default(name, growth):
    assert METHODS[name]([nn.Parameter(torch.ones(2, 2))]).param_groups[0]["rate_growth"] == growth


def test_newtons_step_keeps_its_length_by_default():
    p = [nn.Parameter(torch.ones(2, 2))]
    assert PSGD(p, criterion="hessian").param_groups[0]["rate_growth"] == 1
    assert PSGD(p, criterion="hessian", adaptive_rate=AdaptiveRate()).param_groups[0]["rate_growth"] == 1.1
