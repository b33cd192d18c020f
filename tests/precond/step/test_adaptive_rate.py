"""Does each parameter's rate follow the sign of the slope along its last direction, as the formula says?"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

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
    options = {option: own for option, (own, _) in METHODS[name].by_rate.items()}  # which would follow the rate
    plain, ours = (trained(METHODS[name], adaptive_rate=rate, **options)[0] for rate in (None, AdaptiveRate(*numbers)))
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

    betas = (0.9, 0.95)
    plain, (ours, optimizer, params) = (
        trained(SOAP, adaptive_rate=None, betas=betas)[0],
        trained(grouped, adaptive_rate=AdaptiveRate(2.0), betas=betas),
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


def test_a_last_direction_that_is_spoilt_refuses_the_step():
    model = nn.Linear(3, 2)
    optimizer = SOAP(model.parameters())

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.state[model.weight]["last_direction"][0, 1] = torch.nan
    before = model.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="state holds NaN or inf, in state.*last_direction"):
        step()
    assert torch.equal(model.weight, before)


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


OWN = {"SOAP": 1.1, "Muon": 1.2, "PSGD": 1.1, "Shampoo": 1.1, "KLShampoo": 1.1}


def made(name: str, *args, **options) -> torch.optim.Optimizer:
    return METHODS[name]([nn.Parameter(torch.ones(2, 2))], *args, **options)


def growths(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["rate_growth"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", OWN)
def test_who_gives_a_rate_gets_the_published_method(name):
    assert growths(made(name)) == growths(made(name, None)) == growths(made(name, adaptive_rate="auto")) == [OWN[name]]
    for plain in (made(name, 0.03), made(name, lr=torch.tensor(0.03)), made(name, adaptive_rate=None)):
        assert growths(plain) == [1] and plain.param_groups[0]["lr"] == pytest.approx(0.03)
    assert growths(made(name, lr=0.1, adaptive_rate=AdaptiveRate(1.5))) == [1.5]
    assert growths(made("SOAPMuon")) == [1]


@pytest.mark.parametrize("name", OWN)
def test_a_group_that_gives_a_rate_gets_the_published_method(name):
    def group(**options):
        return {"params": [nn.Parameter(torch.ones(2, 2))], **options}

    given = [
        *(group(), group(lr=0.1), group(lr=None)),
        *(
            group(lr=0.1, adaptive_rate=AdaptiveRate(1.5)),
            group(adaptive_rate=None),
            group(lr=0.1, adaptive_rate="auto"),
        ),
    ]
    optimizer = METHODS[name](given)
    assert growths(optimizer) == [OWN[name], 1, OWN[name], 1.5, 1, 1]
    later = copy.deepcopy(optimizer)
    again = METHODS[name](optimizer.param_groups)
    assert growths(again) == growths(optimizer)
    later.add_param_group(group())
    later.add_param_group(group(lr=0.1))
    assert growths(later)[-2:] == [OWN[name], 1]
    plain = METHODS[name]([group()], lr=0.1)
    plain.add_param_group(group())
    assert growths(plain) == [1, 1]


@pytest.mark.parametrize(
    ("name", "published"), [("SOAP", (0.95, 0.95)), ("Shampoo", (0.9, 0.999)), ("KLShampoo", (0.95, 0.95))]
)
def test_betas_follow_the_rate(name, published):
    def betas(*args, **options):
        return made(name, *args, **options).param_groups[0]["betas"]

    assert betas() == betas(0.1, adaptive_rate=AdaptiveRate()) == (0.9, 0.95)
    assert betas(0.1) == betas(adaptive_rate=None) == published
    assert betas(betas=(0.8, 0.9)) == betas(0.1, betas=(0.8, 0.9)) == (0.8, 0.9)
    p, q, r = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [{"params": [p]}, {"params": [q], "lr": 0.1}, {"params": [r], "lr": 0.1, "betas": (0.5, 0.6)}]
    assert [group["betas"] for group in METHODS[name](groups).param_groups] == [(0.9, 0.95), published, (0.5, 0.6)]


@pytest.mark.parametrize("name", OWN)
def test_a_given_rate_is_the_default_one_without_its_factors(name):
    def moves(**options):
        params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
        optimizer = METHODS[name](params, **options)
        for gradients in all_gradients()[:4]:
            for p, g in zip(params, gradients, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
        return params, optimizer

    (given, _), (plain, _), (found, optimizer) = moves(lr=0.03), moves(adaptive_rate=None), moves()
    assert all(torch.equal(p, q) for p, q in zip(given, plain, strict=True))
    assert not any(torch.allclose(p, q) for p, q in zip(given, found, strict=True))
    assert f"rate_growth={OWN[name]}" in str(optimizer)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
    ],
    ids=["lambda", "cycle"],
)
def test_a_scheduler_leaves_the_rates_adaptive(schedule):
    optimizer = made("SOAP")
    scheduler = schedule(optimizer)
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert growths(optimizer) == [1.1] and 1 < optimizer.state[p]["rate"] < 1.1**3


@pytest.mark.parametrize("options", [({}, {"lr": 0.5}), ({"lr": 0.5}, {})], ids=["found", "given"])
def test_a_state_goes_on_as_it_was_saved_whatever_the_optimizer_was_given(options):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    first = SOAP(params, **options[0])
    for gradients in all_gradients()[:4]:
        step(first, params, gradients, 1.0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    second = SOAP(copies, **options[1])
    second.load_state_dict(first.state_dict())
    assert growths(second) == growths(first) and second.param_groups[0]["betas"] == first.param_groups[0]["betas"]
    for gradients in all_gradients()[4:7]:
        step(first, params, gradients, 0.5)
        step(second, copies, gradients, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_newtons_step_keeps_its_length_by_default():
    assert growths(made("PSGD", criterion="hessian")) == [1]
    assert growths(made("PSGD", criterion="hessian", adaptive_rate=AdaptiveRate())) == [1.1]


def test_a_method_without_a_default_refuses_none():
    with pytest.raises(TypeError, match="SPlus: lr is a number"):
        made("SPlus", lr=None)
