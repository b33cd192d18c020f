"""Does a look-ahead take every step from the point that EMA-Nesterov defines, and give the iterate back?"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precond import (
    MFAC,
    PSGD,
    SOAP,
    EMANesterov,
    GaLore,
    Hyperball,
    KLShampoo,
    Muon,
    Newton,
    Shampoo,
    SOAPMuon,
    SPlus,
    WeightDecay,
)

METHODS = {cls.__name__: cls for cls in (SOAP, Muon, Shampoo, KLShampoo, SPlus, SOAPMuon, PSGD, MFAC, GaLore)}
TARGET = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slope(point: Tensor, step: int) -> Tensor:
    """Gradient of a problem that changes with the step, at a point."""
    noise = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + step))
    return (point - TARGET) + 0.3 * noise


def train(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: range) -> None:
    for step in steps:
        p.grad = slope(p.detach(), step)
        optimizer.step()


def strength(step: int) -> float:
    """Off in the first steps and in the last ones."""
    return 2.0 if 2 <= step < 8 else 0.0


def naive(base: Callable[[Tensor, Tensor], Tensor], beta: Callable[[int], float], decay: float, steps: int) -> Tensor:
    r"""``theta``, from the paper's two lines; ``base`` takes a point and a gradient to the next point."""
    theta, trend = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for step in range(steps):
        # The loop took its gradient where the step before had left the parameter, with the strength of then.
        ahead = theta + (beta(step - 1) * trend if step else 0)
        new = base(ahead, slope(ahead, step))
        theta, trend = new, decay * trend + (1 - decay) * (new - theta)
    return theta


@pytest.mark.parametrize("beta", [lambda step: 1.5, strength], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", METHODS)
def test_the_iterates_are_those_of_the_definition_around_every_method(name, beta):
    options = {"window": 4, "damping": 0.1} if name == "MFAC" else {}
    decayed = {"weight_decay": WeightDecay(0.1, "cautious")}

    def method() -> Callable[[Tensor, Tensor], Tensor]:
        q = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        twin = METHODS[name]([q], lr=0.05, **options, **decayed)

        def base(point: Tensor, gradient: Tensor) -> Tensor:
            with torch.no_grad():
                q.copy_(point)
            q.grad = gradient.clone()
            twin.step()
            return q.detach().clone()

        return base

    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = METHODS[name]([p], lr=0.05, lookahead=EMANesterov(beta, 0.8), **options, **decayed)
    for steps in (5, 10):
        train(optimizer, p, range(steps - 5, steps))
        expected, held = naive(method(), beta, 0.8, steps), p.detach().clone()
        with optimizer.without_lookahead():
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-11)
        assert torch.equal(p, held)
        assert torch.allclose(held, expected, rtol=0, atol=1e-11) == (beta(steps - 1) == 0)


def test_a_number_stands_for_the_strength_and_zero_for_the_plain_run():
    values = []
    for lookahead in (None, 0.0, EMANesterov(0.0), 1.0, EMANesterov(1.0)):
        p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        optimizer = SOAP([p], lr=0.05, lookahead=lookahead)
        train(optimizer, p, range(6))
        values.append(p.detach().clone())
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
    assert torch.equal(values[3], values[4]) and not torch.equal(values[2], values[3])


def test_a_resumed_run_goes_on_bit_for_bit():
    def make() -> tuple[nn.Parameter, Muon]:
        p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        p.data += 0.1
        return p, Muon([p], lr=0.05, lookahead=EMANesterov(strength, 0.8), norm_control=Hyperball())

    (p, optimizer), (q, other) = make(), make()
    train(optimizer, p, range(4))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    q.data.copy_(p)
    r, third = copy.deepcopy((p, optimizer))
    for pair in ((optimizer, p), (other, q), (third, r)):
        train(*pair, range(4, 9))
    assert torch.equal(p, q) and torch.equal(p, r)


def test_a_group_that_comes_later_looks_ahead_from_its_own_first_step():
    p, q = (nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in range(2))
    optimizer = Muon([p], lr=0.05, lookahead=EMANesterov(1.0, 0.5))
    train(optimizer, p, range(2))
    optimizer.add_param_group({"params": [q], "lookahead": None})
    p.grad, q.grad = slope(p.detach(), 2), slope(q.detach(), 2)
    optimizer.step()
    assert "trend" in optimizer.state[p] and "trend" not in optimizer.state[q]
    with optimizer.without_lookahead():
        assert torch.equal(q, q.detach())


def test_a_refused_step_leaves_the_trend_and_the_point():
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = SOAP([p], lr=0.05, lookahead=1.0)
    train(optimizer, p, range(3))
    trend, held = optimizer.state[p]["trend"].clone(), p.detach().clone()
    p.grad = torch.full((3, 4), math.nan, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="skips a step"):
        optimizer.step()
    assert torch.equal(optimizer.state[p]["trend"], trend) and torch.equal(p, held)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: SOAP(p, lookahead="far"), TypeError, "lookahead is a number"),
        (lambda p: SOAP(p, lookahead=-1.0), ValueError, "lookahead"),
        (lambda p: EMANesterov(math.inf), ValueError, "strength"),
        (lambda p: EMANesterov(1.0, 1.0), ValueError, "decay"),
        (lambda p: SOAP(p, lookahead=lambda step: -1.0), ValueError, "lookahead"),
        (lambda p: Newton(p, lookahead=1.0), TypeError, "Newton has no option 'lookahead'"),
        (lambda p: Newton([{"params": p, "lookahead": 1.0}]), ValueError, "Newton takes no norm_control and no look"),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make([nn.Parameter(torch.ones(2, 2))])
