"""Do the rates of layer-based methods follow the slope along the momentum, as the formula says?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from precond import (
    KFAC,
    TNT,
    AdamStep,
    AdaptiveRate,
    Momentum,
    NaturalGradient,
    QuadraticModel,
    SMWNaturalGradient,
    TrustRegion,
)
from precond.step.adaptive_rate import followed

STEPS = 10
RATE = AdaptiveRate(1.5, least=1.0, most=4.0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(24, 4, generator=g).double()
    return x, (x @ torch.arange(12.0).reshape(4, 3).double().cos()).argmax(1)


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 3) * (1 - step / (STEPS + 2))


def run(steps: int = STEPS, model: nn.Module | None = None, optimizer=None, start: int = 0, **options):
    """Moves and momenta of every step, and what made them."""
    model = network() if model is None else model
    if optimizer is None:
        options = {"lr": 0.1, "fisher": "exact", "momentum": Momentum(0.9, nesterov=True)} | options
        optimizer = options.pop("make", KFAC)(model, nn.CrossEntropyLoss(), **options)
    sign = -1 if optimizer.param_groups[0]["maximize"] else 1
    moves, slopes = [], []
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["first_lr"]
        x, y = batch(step)
        optimizer.zero_grad()
        optimizer.loss_fn(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        row = []
        for p in model.parameters():
            v = optimizer.state.get(p, {}).get("momentum_buffer")
            row.append(0.0 if v is None else float((p.grad * v).sum()))  # of the descent, also where p.grad is turned
            p.grad.mul_(sign)
        optimizer.step()
        slopes.append(row)
        moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    return moves, slopes, optimizer, model


def factors_of(slopes: list[list[float]], rate: AdaptiveRate, sign: int = 1) -> list[list[float]]:
    """From the definition, number by number."""
    now, out, peak = [1.0] * len(slopes[0]), [], 0.1
    for step, row in enumerate(slopes):
        weight = min(1.0, 0.1 * schedule(step) / peak)
        now = [f * rate.growth ** (weight * ((s * sign > 0) - (s * sign < 0))) for f, s in zip(now, row, strict=True)]
        now = [min(max(f, 1 / rate.most), rate.most) for f in now]
        out.append([max(f, rate.least) for f in now])
    return out


@pytest.mark.parametrize("rate", [RATE, AdaptiveRate(2.0, least=0.25, most=3.0)], ids=["up", "down as well"])
@pytest.mark.parametrize("clip", [None, TrustRegion(1e-2, lr=0.1)], ids=["free", "bounded"])
@pytest.mark.parametrize("make", [KFAC, TNT, NaturalGradient])
def test_a_move_is_that_of_the_plain_method_times_its_factor(make, clip, rate):
    """Step by step: a copy without rates takes the same step from the same state, with the learning rate alone."""
    _, slopes, adaptive, model = run(STEPS - 1, make=make, kl_clip=clip, adaptive_rate=rate)
    plain_model = copy.deepcopy(model)
    plain = make(plain_model, nn.CrossEntropyLoss(), fisher="exact", lr=0.1, kl_clip=clip, momentum=Momentum(0.9, True))
    state = adaptive.state_dict()
    state["param_groups"][0] |= {"rate_growth": 1.0, "rate_least": 1.0, "rate_most": 1.0}
    plain.load_state_dict(state)
    ours, last, _, _ = run(1, model, adaptive, STEPS - 1)
    theirs, _, _, _ = run(1, plain_model, plain, STEPS - 1)
    factors = factors_of(slopes + last, rate)
    for f, a, b in zip(factors[-1], ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, f * b, rtol=1e-9, atol=1e-14)
    unbounded = factors_of(slopes + last, AdaptiveRate(rate.growth, 1e-9, rate.most))[-1]
    assert [float(adaptive.state[p]["rate"]) for p in model.parameters()] == pytest.approx(unbounded)
    assert len({round(f, 9) for row in factors for f in row}) > 3


def test_the_divergence_of_the_move_counts_the_factors():
    _, _, plain, _ = run(1, kl_clip=1e-2)
    model = network()
    optimizer = KFAC(
        model, nn.CrossEntropyLoss(), fisher="exact", lr=0.1, momentum=0.9, kl_clip=1e-2, adaptive_rate=RATE
    )
    run(1, model, optimizer)
    assert optimizer.metrics()["kl"] == pytest.approx(plain.metrics()["kl"])  # of the first step, at a factor of 1
    for p in model.parameters():
        optimizer.state[p]["rate"] = torch.tensor(2.0).double()
        optimizer.state[p].pop("momentum_buffer")
        optimizer.state[p].pop("length", None)
    twin_model = copy.deepcopy(model)
    twin = KFAC(twin_model, nn.CrossEntropyLoss(), fisher="exact", lr=0.1, momentum=0.9, kl_clip=1e-2)
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"rate_growth": 1.0, "rate_least": 1.0, "rate_most": 1.0}
    twin.load_state_dict(state)
    run(1, model, optimizer, 1)
    run(1, twin_model, twin, 1)
    assert optimizer.metrics()["kl"] == pytest.approx(4 * twin.metrics()["kl"])


def test_an_ascent_is_the_descent_of_the_negative():
    down, _, _, _ = run(adaptive_rate=RATE, kl_clip=1e-2)
    up, _, _, _ = run(adaptive_rate=RATE, kl_clip=1e-2, maximize=True)
    for a, b in zip(down[-1], up[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_a_resumed_run_goes_on_bit_for_bit_and_an_older_one_at_its_own_rate():
    _, _, optimizer, model = run(4, adaptive_rate=RATE)
    other = copy.deepcopy(model)
    resumed = KFAC(other, nn.CrossEntropyLoss(), fisher="exact", lr=0.1, adaptive_rate=RATE)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first, second = run(3, model, optimizer, 4)[0], run(3, other, resumed, 4)[0]
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    _, _, old, model = run(4)
    saved = old.state_dict()
    assert "rate_growth" not in saved["param_groups"][0]
    new = KFAC(model, nn.CrossEntropyLoss(), fisher="exact", lr=0.1, adaptive_rate=RATE)
    new.load_state_dict(saved)
    run(1, model, new, 4)
    assert all("rate" not in new.state[p] for p in model.parameters())


def test_what_it_cannot_follow_is_refused_and_adams_steps_do_not_feel_it():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="follows the slope along the momentum, and there is none"):
        KFAC(model, loss_fn, momentum=0.0, adaptive_rate=RATE)
    with pytest.raises(ValueError, match="no effect with step_size"):
        KFAC(model, loss_fn, step_size=QuadraticModel(), adaptive_rate=RATE)
    with pytest.raises(ValueError, match="holds the last one itself"):
        SMWNaturalGradient(model, loss_fn, lr=0.1, spring=0.5, momentum=0.5, adaptive_rate=RATE)
    quiet = [{"params": model[0].parameters(), "momentum": 0.0}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="there is none"):
        KFAC(model, loss_fn, params=quiet, adaptive_rate=RATE)
    own = [{"params": list(model[0].parameters()), "adaptive_rate": RATE}, {"params": list(model[2].parameters())}]
    with pytest.raises(ValueError, match="no effect with step_size"):
        KFAC(model, loss_fn, step_size=QuadraticModel(), params=own)
    run(3, model, optimizer := KFAC(model, loss_fn, params=own))
    assert "rate" in optimizer.state[model[0].weight] and "rate" not in optimizer.state[model[2].weight]
    first = model[0].weight, model[0].bias
    optimizer = KFAC(model, loss_fn, structures={"0": AdamStep()}, adaptive_rate=RATE)
    run(4, model, optimizer)
    assert all("rate" not in optimizer.state[p] for p in first) and "rate" in optimizer.state[model[2].weight]


def test_a_momentum_that_has_ended_and_half_precision_lead_nowhere():
    model = network()
    optimizer = KFAC(
        model, nn.CrossEntropyLoss(), fisher="exact", momentum=lambda k: 0.9 if k < 4 else 0.0, adaptive_rate=RATE
    )
    run(4, model, optimizer)
    before = [float(optimizer.state[p]["rate"]) for p in model.parameters()]
    run(3, model, optimizer, 4)
    assert before == [float(optimizer.state[p]["rate"]) for p in model.parameters()]
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    group = {
        "params": [p],
        "lr": 0.02,
        "first_lr": 1.0,
        "momentum": 0.9,
        "maximize": False,
        **AdaptiveRate().in_groups(),
    }
    state: dict[str, Tensor] = {}
    for _ in range(60):
        followed([p], torch.ones(1, dtype=torch.float64), {p: state}, [group])
    assert float(state["rate"]) == pytest.approx(1.1 ** (60 * 0.02), rel=1e-5)


def test_a_scheduler_that_ends_leaves_the_factors_as_they_are():
    model = network()
    optimizer = KFAC(model, nn.CrossEntropyLoss(), fisher="exact", lr=0.1, adaptive_rate=RATE)
    scheduler = LambdaLR(optimizer, lambda k: 1.0 if k < 3 else 0.0)
    rates = []
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        optimizer.loss_fn(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        rates.append([float(optimizer.state[p]["rate"]) for p in model.parameters()])
    assert rates[2] == rates[3] == rates[5] != rates[1]
