"""Do matrices under a control of norms move as its definition says, in every method, and all else as before?"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from precond import (
    KFAC,
    MFAC,
    PSGD,
    SOAP,
    GaLore,
    Hyperball,
    KLShampoo,
    Momentum,
    Muon,
    Newton,
    RadialBrake,
    Shampoo,
    SOAPMuon,
    SPlus,
    UpdateFloor,
    WeightDecay,
)
from precond.step.base import SecondOrderOptimizer
from tests.precond import references as ref

LR = 0.1
METHODS = {cls.__name__: cls for cls in (SOAP, Muon, Shampoo, KLShampoo, SPlus, SOAPMuon, PSGD, MFAC, GaLore)}
CONTROLS = {
    "hyperball": Hyperball(),
    "floor": UpdateFloor(0.8),
    "row floor": UpdateFloor(0.8, rows=True),
    "brake": RadialBrake(0.3, 0.7),
    "brake, floor": (UpdateFloor(0.8), RadialBrake(0.0, 1.0)),
    "row floor, hyperball": (Hyperball(), UpdateFloor(0.8, rows=True)),
}


class Plain(SecondOrderOptimizer):
    """The step without a curvature."""

    shapes_update = True

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return {p: g.clone() for p, g in gradients.items()}


def gradient(step: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * 0.4


def start(shape: tuple[int, ...] = (3, 4)) -> Tensor:
    return gradient(99, shape)


def naive(control: Any, start: Tensor, updates: list[Tensor], lr: float, keep: float = 1.0) -> list[Tensor]:
    """Number by number, from the definitions."""
    parts = {type(c): c for c in (control if isinstance(control, tuple) else (control,))}
    rows = [[float(x) for x in row] for row in start.reshape(len(start), -1)]
    radius = math.sqrt(sum(x * x for row in rows for x in row))
    out = []
    for update in updates:
        v = [[keep * x for x in row] for row in rows]
        u = [[float(x) for x in row] for row in update.reshape(len(update), -1)]
        length = math.sqrt(sum(x * x for row in v for x in row))
        target = None
        if brake := parts.get(RadialBrake):
            radial = sum(a * b for x, y in zip(u, v, strict=True) for a, b in zip(x, y, strict=True)) / length**2
            left = brake.outward if radial < 0 else brake.inward
            u = [[a - (1 - left) * radial * b for a, b in zip(x, y, strict=True)] for x, y in zip(u, v, strict=True)]
        if floor := parts.get(UpdateFloor):
            if floor.rows:
                for i, (x, y) in enumerate(zip(u, v, strict=True)):
                    size, least = math.hypot(*x), floor.ratio * math.hypot(*y)
                    u[i] = [a * max(1.0, least / size) for a in x]
            else:
                size = math.sqrt(sum(a * a for x in u for a in x))
                u = [[a * max(1.0, floor.ratio * length / size) for a in x] for x in u]
        if Hyperball in parts:
            size = math.sqrt(sum(a * a for x in u for a in x))
            u, target = [[radius * a / size for a in x] for x in u], radius
        elif RadialBrake in parts:
            inner = sum(a * b for x, y in zip(u, v, strict=True) for a, b in zip(x, y, strict=True))
            target = length - lr * inner / length
        rows = [[b - lr * a for a, b in zip(x, y, strict=True)] for x, y in zip(u, v, strict=True)]
        if target is not None:
            reached = math.sqrt(sum(x * x for row in rows for x in row))
            rows = [[x * target / reached for x in row] for row in rows]
        out.append(torch.tensor(rows, dtype=torch.float64).reshape(start.shape))
    return out


@pytest.mark.parametrize("kind", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
@pytest.mark.parametrize("name", CONTROLS)
def test_a_step_is_that_of_the_definition(name, shape, kind):
    p, v = nn.Parameter(start(shape)), nn.Parameter(start((4,)))
    optimizer = Plain([p, v], lr=kind(LR), norm_control=CONTROLS[name])
    plain = nn.Parameter(start((4,)))
    other = Plain([plain], lr=kind(LR))
    updates = [gradient(step, shape) for step in range(6)]
    for step, (expected, update) in enumerate(
        zip(naive(CONTROLS[name], start(shape), updates, LR), updates, strict=True)
    ):
        p.grad, v.grad, plain.grad = update.clone(), gradient(step, (4,)), gradient(step, (4,))
        optimizer.step()
        other.step()
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)
        assert torch.equal(v, plain)  # vectors take the plain step


@pytest.mark.parametrize("name", CONTROLS)
def test_it_comes_after_momentum_decay_and_maximize(name):
    p, decay = nn.Parameter(start()), WeightDecay(0.5, "l2" if "hyperball" in name else "decoupled")
    optimizer = Plain(
        [p], lr=LR, momentum=Momentum(0.8, True), weight_decay=decay, maximize=True, norm_control=CONTROLS[name]
    )
    buffer, value, keep = torch.zeros(3, 4, dtype=torch.float64), start(), 1 if "hyperball" in name else 1 - 0.5 * LR
    norm = start()
    for step in range(6):
        g = -gradient(step, (3, 4)) + (0.5 * value if "hyperball" in name else 0)
        buffer = 0.8 * buffer + g
        (value,) = naive(CONTROLS[name], value, [g + 0.8 * buffer], LR, keep)
        if "hyperball" in name:  # the norm before the first step, not that of the one at hand
            value = value * norm.norm() / value.norm()
        p.grad = gradient(step, (3, 4))
        optimizer.step()
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_uses_gradients_alone_stays_on_the_hyperball(method):
    """And moves by about lr of the norm: at most as far as a step along a tangent that comes back to the sphere."""
    options = {"window": 4, "damping": 0.1} if method == "MFAC" else {}
    model = ref.SmallModel()
    optimizer = METHODS[method](model.parameters(), lr=0.05, norm_control=Hyperball(), **options)
    norms = {name: float(p.detach().norm()) for name, p in model.named_parameters()}
    for step in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        ref.loss_of(model, step).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            if p.ndim > 1:
                assert float(p.detach().norm()) == pytest.approx(norms[name], rel=1e-12)
                moved = float((p.detach() - before[name]).norm()) / norms[name]
                assert 0.01 < moved <= 0.05 / math.sqrt(1 - 0.05**2) * (1 + 1e-9)
            else:
                assert float(p.detach().norm()) != pytest.approx(norms[name], rel=1e-6)


def test_a_brake_of_nothing_keeps_the_norm_and_one_of_all_of_it_changes_the_second_order_alone():
    for outward, inward in ((0.0, 0.0), (1.0, 1.0)):
        p = nn.Parameter(start())
        control = RadialBrake(outward, inward) if outward == 0 else RadialBrake(1.0, 1.0)
        optimizer = Plain([p], lr=LR, norm_control=control)
        p.grad = gradient(0, (3, 4))
        optimizer.step()
        if outward == 0:
            assert float(p.detach().norm()) == pytest.approx(float(start().norm()), rel=1e-14)
        else:  # it brakes nothing, so that it is none
            torch.testing.assert_close(p.detach(), start() - LR * gradient(0, (3, 4)), rtol=0, atol=1e-16)


def test_cautious_decay_changes_the_shape_on_the_hyperball():
    values = []
    for decay in (0.0, WeightDecay(0.5, "cautious")):
        p = nn.Parameter(start())
        optimizer = Plain([p], lr=LR, norm_control=Hyperball(), weight_decay=decay)
        p.grad = gradient(0, (3, 4))
        optimizer.step()
        values.append(p.detach().clone())
        u = gradient(0, (3, 4))
        kept = start() * (1 - LR * 0.5 * (u * start() >= 0).double() * bool(decay))
        moved = kept - LR * start().norm() * u / u.norm()
        torch.testing.assert_close(values[-1], moved * start().norm() / moved.norm(), rtol=0, atol=1e-15)
    assert not torch.allclose(*values)


def test_groups_have_their_own_control_and_a_group_may_come_later():
    a, b, c = (nn.Parameter(start()) for _ in range(3))
    optimizer = Plain([{"params": [a]}, {"params": [b], "norm_control": None}], lr=LR, norm_control=Hyperball())
    optimizer.add_param_group({"params": [c], "norm_control": UpdateFloor(5.0)})
    for p in (a, b, c):
        p.grad = gradient(0, (3, 4))
    optimizer.step()
    torch.testing.assert_close(b.detach(), start() - LR * gradient(0, (3, 4)), rtol=0, atol=1e-16)
    for p, control in ((a, Hyperball()), (c, UpdateFloor(5.0))):
        (expected,) = naive(control, start(), [gradient(0, (3, 4))], LR)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_the_norm_is_saved_and_a_resumed_run_goes_on_bit_for_bit():
    """The norm kept is that before the first step, also where the loaded weights have another one."""

    def make() -> tuple[nn.Parameter, SOAP]:
        p = nn.Parameter(start())
        return p, SOAP([p], lr=LR, norm_control=(Hyperball(), UpdateFloor(lambda step: 0.1 * step, rows=True)))

    def step(p: nn.Parameter, optimizer: SOAP, number: int) -> None:
        p.grad = gradient(number, (3, 4))
        optimizer.step()

    (p, optimizer), (q, other) = make(), make()
    for number in range(3):
        step(p, optimizer, number)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        q.copy_(p)
    twin = copy.deepcopy((p, optimizer))
    for number in range(3, 6):
        for pair in ((p, optimizer), (q, other), twin):
            step(*pair, number)
    assert torch.equal(p, q) and torch.equal(p, twin[0])
    assert optimizer.state[p]["radius"].item() == pytest.approx(float(start().norm()), rel=1e-15)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", [SOAP, MFAC])
def test_distributed_checkpoints_keep_all_that_the_update_needs(method, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    own = {"window": 3, "damping": 0.1} if method is MFAC else {"row_normalization": 0.8}

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = ref.SmallModel()
        return model, method(model.parameters(), lr=0.05, norm_control=Hyperball(), lookahead=0.5, **own)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        for step in steps:
            optimizer.zero_grad()
            ref.loss_of(model, step).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    whole, first, second = make(), make(), make()
    train(*first, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, saved, options=options)
    expected, found = train(*whole, range(6)), train(*second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_bfloat16_does_not_let_the_norm_drift():
    p = nn.Parameter(gradient(0, (32, 32)).to(torch.bfloat16))
    optimizer = Muon([p], lr=0.02, norm_control=Hyperball())
    first = float(p.detach().double().norm())
    for step in range(60):
        p.grad = gradient(step, (32, 32)).to(torch.bfloat16)
        optimizer.step()
    # Entries round by at most 2^-9 of themselves, in both directions.
    assert float(p.detach().double().norm()) == pytest.approx(first, rel=2e-4)


def test_a_refused_step_leaves_no_trace():
    p = nn.Parameter(start())
    optimizer = SOAP([p], lr=LR, norm_control=Hyperball())
    p.grad = torch.full((3, 4), math.nan, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="skips a step"):
        optimizer.step()
    assert torch.equal(p, start()) and "radius" not in optimizer.state[p]


def test_a_rate_of_zero_moves_nothing():
    p = nn.Parameter(start())
    optimizer = Plain([p], lr=0.0, norm_control=(Hyperball(), UpdateFloor(1.0)))
    p.grad = gradient(0, (3, 4))
    optimizer.step()
    assert torch.equal(p, start())


def test_zero_updates_stay_zero_and_zero_matrices_are_refused_on_the_hyperball():
    for control in (UpdateFloor(1.0), UpdateFloor(1.0, rows=True), RadialBrake()):
        for value, update in ((start(), start() * 0), (start() * 0, start()), (start() * 0, start() * 0)):
            p = nn.Parameter(value.clone())
            optimizer = Plain([p], lr=LR, norm_control=control)
            p.grad = update.clone()
            optimizer.step()
            torch.testing.assert_close(p.detach(), value - LR * update, rtol=0, atol=1e-15)
    p = nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) begins at zero.*norm_control=None"):
        Plain([p], lr=LR, norm_control=Hyperball()).step()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: SOAP(p, norm_control="hyperball"), TypeError, r"norm_control is Hyperball\(\).*got 'hyperball'"),
        (lambda p: SOAP(p, norm_control=(Hyperball(), Hyperball())), ValueError, "two of a kind"),
        (lambda p: SOAP(p, norm_control=Hyperball(), kl_clip=1.0), ValueError, "kl_clip=1.0 would not bound"),
        (lambda p: SOAP(p, norm_control=UpdateFloor(), kl_clip=1.0), ValueError, "kl_clip=1.0 would not bound"),
        (lambda p: SOAP(p, norm_control=Hyperball(), weight_decay=0.1), ValueError, "decoupled weight decay has no"),
        (lambda p: Muon(p, norm_control=Hyperball(), stacked=True), ValueError, "stacked=True makes it several"),
        (lambda p: UpdateFloor(-1.0), ValueError, "ratio"),
        (lambda p: RadialBrake(outward=math.nan), ValueError, "outward"),
        (lambda p: SOAP(p, norm_control=UpdateFloor(lambda step: -1.0)), ValueError, "update_floor"),
        (lambda p: Newton(p, norm_control=Hyperball()), TypeError, "Newton has no option 'norm_control'"),
        (lambda p: Newton([{"params": p, "norm_control": Hyperball()}]), ValueError, "Newton takes no norm_control"),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make([nn.Parameter(start())])


def test_layer_based_methods_refuse_it():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="KFAC takes no norm_control and no lookahead"):
        KFAC(model, nn.MSELoss(), lr=0.1, params=[{"params": list(model.parameters()), "norm_control": Hyperball()}])


def test_stacked_matrices_are_compared_one_by_one():
    first, second = start(), 100 * start()
    whole = nn.Parameter(torch.stack([first, second]))
    alone = [nn.Parameter(first.clone()), nn.Parameter(second.clone())]
    for control in (UpdateFloor(2.0), UpdateFloor(2.0, rows=True), RadialBrake(0.2)):
        one = Muon([whole], lr=LR, stacked=True, norm_control=control)
        two = Muon(alone, lr=LR, norm_control=control)
        whole.grad = torch.stack([gradient(0, (3, 4)), gradient(1, (3, 4))])
        for i, p in enumerate(alone):
            p.grad = gradient(i, (3, 4))
        one.step()
        two.step()
        torch.testing.assert_close(whole.detach(), torch.stack([p.detach() for p in alone]), rtol=1e-13, atol=1e-13)
