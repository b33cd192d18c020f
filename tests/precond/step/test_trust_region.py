"""Is the divergence of the move that is made at most what is promised, and does the learning rate keep its meaning?"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR

from precond import KFAC, SOAP, Momentum, NaturalGradient, Newton, SMWNaturalGradient, TrustRegion, methods

LAYERED = [method.name for method in methods() if method.needs == "layers"]
CLASSES: dict[str, Any] = {method.name: method.cls for method in methods()}


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(step: int, n: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 4, generator=g).double()
    return x, (x @ torch.arange(12.0).reshape(4, 3).double().cos()).argmax(1)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def fisher(model: nn.Module, x: Tensor, y: Tensor, empirical: bool = False) -> Tensor:
    """The dense Fisher of a softmax model, from its Jacobian and the covariance of the labels."""
    model = copy.deepcopy(model)
    named, sizes = dict(model.named_parameters()), [p.shape for p in model.parameters()]

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in sizes])
        values = {n: part.reshape(s) for n, part, s in zip(named, parts, sizes, strict=True)}
        return functional_call(model, values, (x,))

    theta = flat(model)
    J, p = torch.func.jacrev(outputs)(theta), outputs(theta).softmax(-1)  # (n, C, P), (n, C)
    if empirical:
        g = torch.einsum("ncp,nc->np", J, p - torch.eye(3).double()[y])
        return g.T @ g / len(x)
    S = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ncp,ncd,ndq->pq", J, S, J) / len(x)


def step(model: nn.Module, optimizer: Any, k: int, loss_fn: nn.Module | None = None) -> None:
    x, y = data(k)
    optimizer.zero_grad()
    (loss_fn or optimizer.loss_fn)(model(x), y).backward()
    optimizer.step()


DENSE: dict[str, Callable[..., Any]] = {
    "natural": lambda model, **o: NaturalGradient(
        model, nn.CrossEntropyLoss(), structure="dense", fisher="exact", curvature_ema=0.0, damping=1e-3, **o
    ),
    "smw": lambda model, **o: SMWNaturalGradient(model, nn.CrossEntropyLoss(), damping=1e-3, **o),
    "spring": lambda model, **o: SMWNaturalGradient(model, nn.CrossEntropyLoss(), damping=1e-2, spring=0.9, **o),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9, Momentum(0.9, nesterov=True)], ids=["none", "heavy", "nesterov"])
@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("halves", [False, True], ids=["step", "precondition"])
def test_the_move_has_the_promised_length_in_the_damped_fisher(method: str, momentum: Any, halves: bool) -> None:
    """Where the bound is active the length is the bound, to rounding; elsewhere it is below, and the step is free."""
    bound, model, free = 0.01, network(), 0
    optimizer = DENSE[method](model, lr=0.5, momentum=momentum, kl_clip=bound)
    schedule = CosineAnnealingLR(optimizer, 12)
    for k in range(12):
        x, y = data(k % 5)
        F, before = fisher(model, x, y, empirical=method != "natural"), flat(model)
        M = F + optimizer.param_groups[0]["damping"] * torch.eye(len(F)).double()
        promised = bound * (optimizer.param_groups[0]["lr"] / 0.5) ** 2
        optimizer.zero_grad()
        optimizer.loss_fn(model(x), y).backward()
        if halves:
            optimizer.precondition()
        optimizer.step()
        m = flat(model) - before
        assert m @ M @ m <= promised * (1 + 1e-9)
        assert m @ F @ m <= promised
        assert optimizer.metrics()["kl"] == pytest.approx(float(m @ M @ m) / 2, rel=1e-9)
        free += bool(m @ M @ m < promised * (1 - 1e-9))
        schedule.step()
    assert optimizer.metrics()["bound"] == pytest.approx(1 - free / 12)
    assert free < 6, "the bound was hardly active, so the test says little"


def test_the_bound_before_momentum_promises_too_little() -> None:
    """What other libraries bound, kept as an option: with momentum the move is longer by an order of magnitude."""
    lengths = {}
    for of in ("move", "direction"):
        model = network()
        optimizer: Any = DENSE["natural"](model, lr=0.5, momentum=0.9, kl_clip=TrustRegion(1e-3, of=of))
        for _ in range(12):
            F, before = fisher(model, *data(0)), flat(model)
            step(model, optimizer, 0)
            m = flat(model) - before
            lengths[of] = max(lengths.get(of, 0.0), float(m @ F @ m))
        assert optimizer.metrics()["bound"] > 0.9
    assert lengths["move"] < 1e-3 < 10e-3 < lengths["direction"]


def test_learning_rates_keep_their_meaning_where_the_bound_is_active() -> None:
    """A schedule, and the rate to begin with under a reference, multiply the bound move."""

    def move(first: float, then: float, region: Any) -> Tensor:
        model = network()
        optimizer = DENSE["natural"](model, lr=first, momentum=0.9, kl_clip=region)
        optimizer.param_groups[0]["lr"] = then
        before = flat(model)
        step(model, optimizer, 0)
        assert optimizer.metrics()["bound"] == 1
        return flat(model) - before

    torch.testing.assert_close(move(0.5, 1.0, 1e-4), 2 * move(0.5, 0.5, 1e-4), rtol=1e-12, atol=0)
    torch.testing.assert_close(move(1.0, 1.0, 1e-4), move(0.5, 0.5, 1e-4), rtol=1e-12, atol=0)
    region = TrustRegion(1e-5, lr=0.1)
    torch.testing.assert_close(move(1.0, 1.0, region), 2 * move(0.5, 0.5, region), rtol=1e-12, atol=0)
    torch.testing.assert_close(move(0.1, 0.1, region), move(0.1, 0.1, 1e-5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", LAYERED)
def test_ten_times_the_default_rate_is_another_run(method: str) -> None:
    ends = []
    for lr in (0.03, 0.3):
        model = network()
        optimizer = CLASSES[method](model, nn.CrossEntropyLoss(), lr=lr)
        for k in range(6):
            step(model, optimizer, k)
        optimizer.detach()
        ends.append(flat(model))
    assert (ends[0] - ends[1]).norm() > 0.05 * (ends[0] - flat(network())).norm()


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (lambda o: LinearLR(o, 0.1, total_iters=3), 0.2),
        (lambda o: OneCycleLR(o, 0.4, total_steps=8, cycle_momentum=False), 0.4),
    ],
)
def test_the_reference_is_the_peak_of_a_scheduler(schedule: Any, peak: float) -> None:
    model = network()
    optimizer: Any = DENSE["natural"](model, lr=0.2, momentum=0.9, kl_clip=1e-4)
    scheduler = schedule(optimizer)
    for k in range(7):
        F, before = fisher(model, *data(k)), flat(model)
        step(model, optimizer, k)
        m, lr = flat(model) - before, optimizer.param_groups[0]["lr"]
        length = m @ (F + 1e-3 * torch.eye(len(F)).double()) @ m
        assert length == pytest.approx(1e-4 * (lr / peak) ** 2, rel=1e-8)
        scheduler.step()


def test_an_active_bound_is_told_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = network()
        tight, loose = (KFAC(model, nn.CrossEntropyLoss(), lr=0.3, kl_clip=clip) for clip in (1e-6, 1e6))
        for k in range(70):
            step(model, tight, k)
        tight.detach()
        assert tight.metrics()["bound"] > 0.9
        (record,) = caplog.records
        assert "KFAC: kl_clip=1e-06 has shortened" in record.message and "TrustRegion(kl, lr=...)" in record.message
        for k in range(30):
            step(model, loose, k)
        assert loose.metrics()["bound"] == 0 and len(caplog.records) == 1
        loose.detach()
        model = network()
        default, group = KFAC(model, nn.CrossEntropyLoss(), lr=0.3), {"params": model.parameters(), "kl_clip": 1e-7}
        for k in range(60):
            step(model, default, k)
        assert default.metrics()["bound"] > 0.9 and len(caplog.records) == 1  # nobody asked for it
        default.detach()
        own = KFAC(model, nn.CrossEntropyLoss(), lr=0.3, params=[group])
        for k in range(60):
            step(model, own, k)
        assert len(caplog.records) == 2 and "kl_clip=1e-07 has shortened" in caplog.records[1].message
    free = KFAC(model, nn.CrossEntropyLoss(), lr=0.1, kl_clip=None)
    counts = dict.fromkeys(("refreshes", "failures", "decompositions_in_float64", "decompositions_perturbed"), 0.0)
    assert free.metrics() == {"lr": 0.1, "damping": 0.01, "steps": 0.0, "skipped": 0.0} | counts


def test_a_gradient_method_is_bounded_by_its_own_preconditioner() -> None:
    """Newton's direction on a quadratic is M^-1 g with a constant M, so the carried length is exact."""
    H = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    p = nn.Parameter(torch.tensor([3.0, -2.0, 1.0]).double())
    optimizer = Newton([p], lr=0.3, momentum=0.9, kl_clip=0.5)
    active = 0
    for _ in range(40):
        before = p.detach().clone()
        optimizer.step(lambda: 0.5 * p @ H @ p)
        m = p.detach() - before
        assert m @ H @ m <= 0.5 * (1 + 1e-9)
        active += bool(m @ H @ m > 0.5 * (1 - 1e-9))
    assert 3 < active < 40


@pytest.mark.parametrize("momentum", [0.9, Momentum(0.9, nesterov=True)], ids=["heavy", "nesterov"])
@pytest.mark.parametrize("method", ["KFAC", "Shampoo", "SOAP"])
def test_an_ascent_is_bounded_as_the_descent_of_the_negative(method: str, momentum: Any) -> None:
    """Mostly one gradient, so that a momentum of the wrong sign would shorten its own length."""
    moves = []
    for sign in (1, -1):
        model, options = network(), {"lr": 0.1, "kl_clip": 1e-4, "momentum": momentum, "maximize": sign < 0}
        if method == "KFAC":
            optimizer = KFAC(model, nn.CrossEntropyLoss(), fisher="exact", **options)
        else:
            optimizer = CLASSES[method](model.parameters(), **options)
        for k in range(6):
            x, y = data(k // 3)
            optimizer.zero_grad()
            loss_fn = optimizer.loss_fn if method == "KFAC" else nn.CrossEntropyLoss()
            loss_fn(model(x), y).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(sign)
            optimizer.step()
        moves.append((flat(model), optimizer.metrics()["kl"]))
    torch.testing.assert_close(moves[0][0], moves[1][0], rtol=0, atol=1e-12)
    assert moves[0][1] == pytest.approx(moves[1][1]) and moves[1][1] > 0


def test_groups_may_have_bounds_of_their_own_form() -> None:
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "kl_clip": TrustRegion(0.1, lr=0.2)}, {"params": [layer.bias]}]
    first, second = KFAC(layer, nn.MSELoss(), lr=0.1, kl_clip=0.5, params=groups).param_groups
    assert (first["kl_clip"], first["kl_lr"], second["kl_clip"], second["kl_lr"]) == (0.1, 0.2, 0.5, None)
    number = [{"params": [layer.weight], "kl_clip": 0.1}]  # beside a default with a reference: still the first rate's
    assert KFAC(layer, nn.MSELoss(), lr=0.1, params=number).param_groups[0]["kl_lr"] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrustRegion(0.1, of="step"), "of is one of move, direction, not 'step'"),
        (lambda: TrustRegion(0.1, lr=0.0), "lr of a TrustRegion is a finite number above 0"),
        (lambda: TrustRegion(0.1, lr=0.1, of="direction"), "leave lr out"),
        (lambda: SOAP([nn.Parameter(torch.ones(2))], kl_clip=TrustRegion(-1.0)), "kl_clip must be positive"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_momentum_that_ends_leaves_the_bound() -> None:
    """The buffer of the momentum is still there."""
    moves = []
    for kept in (True, False):
        torch.manual_seed(0)
        model, loss_fn = nn.Linear(3, 2), nn.MSELoss()
        x, y = torch.randn(8, 3), torch.randn(8, 2)
        optimizer = KFAC(model, loss_fn, lr=0.1, momentum=0.9, kl_clip=1e-6)
        for step in range(4):
            if step == 3:
                optimizer.param_groups[0]["momentum"] = 0.0
                before = model.weight.detach().clone()
                for state in () if kept else optimizer.state.values():
                    state.pop("momentum_buffer", None)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        moves.append(model.weight.detach() - before)
    torch.testing.assert_close(moves[0], moves[1])
    assert moves[0].norm() < 0.01
