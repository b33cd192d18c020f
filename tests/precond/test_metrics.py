"""Does every method tell a logger how its steps went, and pay for it only when asked?"""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from precond import (
    EKFAC,
    KFAC,
    PSGD,
    SOAP,
    GaussNewton,
    LevenbergMarquardt,
    Newton,
    QuadraticModel,
    Refresh,
    SecondOrderOptimizer,
    Sophia,
    WeightDecay,
    methods,
)
from precond.step import journal
from solvers import SolverError

LOSS = nn.MSELoss()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(number: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 2, generator=generator, dtype=torch.float64)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(model: nn.Module, optimizer: SecondOrderOptimizer, number: int = 0) -> None:
    x, y = batch(number)

    def closure() -> Tensor:
        return LOSS(model(x), y)

    if isinstance(optimizer, GaussNewton):
        optimizer.step(lambda: (2 / y.numel()) ** 0.5 * (model(x) - y))  # whose half sum of squares is the loss
    elif optimizer.needs == "closure" and not (isinstance(optimizer, PSGD) and optimizer.criterion == "whitening"):
        optimizer.step(closure)
    else:
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()


#: Options without which a method has no step here.
OPTIONS: dict[str, dict[str, Any]] = {"MFAC": {"window": 4}, "GaLore": {"rank": 2}, "Newton": {"damping": 10.0}}


def made(name: str, model: nn.Module, **options: Any) -> SecondOrderOptimizer:
    cls: Any = next(method.cls for method in methods() if method.name == name)
    takes_model = cls.needs == "layers" or name in ("HessianFree", "CurveBall", "GaussNewton", "Newton")
    options = {**OPTIONS.get(name, {}), **options}
    if takes_model:
        try:
            return cls(model, LOSS, **options)
        except TypeError:
            return cls(model.parameters(), **options)
    return cls(model.parameters(), **options)


NAMES = [method.name for method in methods()]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_tells_the_same_flat_floats(name: str) -> None:
    model = network()
    optimizer = made(name, model, lr=0.01)
    always = {"lr", "steps", "skipped", "refreshes", "failures"}
    assert always <= optimizer.metrics().keys()
    for number in range(3):
        before = flat(model)
        step(model, optimizer, number)
        found = optimizer.metrics()
        assert all(type(value) is float for value in found.values()) and always <= found.keys()
        assert found["lr"] == 0.01 and found["steps"] == number + 1 and found["skipped"] == 0
        assert found["step_norm"] == pytest.approx(float((flat(model) - before).norm()), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", ["KFAC", "SOAP", "Sophia", "HessianFree"])
def test_nothing_is_measured_before_somebody_asks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(moves: Any) -> list[Tensor]:
        moves = list(moves)
        calls.extend([1] * len(moves))
        return journal.lengths(moves)

    monkeypatch.setattr("precond.step.base.lengths", counted)
    plain, asked = network(), network()
    quiet, told = made(name, plain, lr=0.01), made(name, asked, lr=0.01)
    told.metrics()
    for number in range(3):
        step(plain, quiet, number)
        assert not calls
        step(asked, told, number)
        assert calls
        calls.clear()
    assert torch.equal(flat(plain), flat(asked))
    assert "step_norm" not in quiet.metrics()


def test_the_move_includes_decay_and_momentum_in_low_precision() -> None:
    model = network().bfloat16()
    optimizer = SOAP(model.parameters(), lr=0.1, momentum=0.5, weight_decay=WeightDecay(0.5))
    optimizer.metrics()
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        LOSS(model(batch()[0].bfloat16()), batch()[1].bfloat16()).backward()
        optimizer.step()
        moves = [
            (p.detach().float() - old.float()).flatten() for p, old in zip(model.parameters(), before, strict=True)
        ]
        # Each norm in float32: its error is about eps times the root of the number of entries.
        assert optimizer.metrics()["step_norm"] == pytest.approx(float(torch.cat(moves).norm()), rel=1e-5)


JUDGED: dict[str, Callable[[nn.Module], SecondOrderOptimizer]] = {
    "KFAC, rule": lambda m: KFAC(m, LOSS, lr=0.1, damping_rule=LevenbergMarquardt(period=1), fisher="exact"),
    "KFAC, rejects": lambda m: KFAC(
        m, LOSS, lr=0.1, damping_rule=LevenbergMarquardt(reject_steps=True), fisher="exact"
    ),
    "EKFAC, model": lambda m: EKFAC(m, LOSS, lr=1.0, step_size=QuadraticModel(), fisher="exact"),
    "Newton": lambda m: Newton(m.parameters(), lr=1.0, damping=1.0, damping_rule=LevenbergMarquardt()),
    "GaussNewton": lambda m: made("GaussNewton", m),
    "CurveBall": lambda m: made("CurveBall", m, damping_rule=LevenbergMarquardt()),
    "HessianFree": lambda m: made("HessianFree", m),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_change_that_was_seen_is_that_of_the_loss(name: str) -> None:
    model = network()
    optimizer = JUDGED[name](model)
    x, y = batch()
    with torch.no_grad():
        before = float(LOSS(model(x), y))
    step(model, optimizer)
    found = optimizer.metrics()
    assert found["predicted_change"] < 0
    with torch.no_grad():
        assert found["actual_change"] == pytest.approx(float(LOSS(model(x), y)) - before, rel=1e-6)


def test_what_a_quadratic_model_promises_is_kept_where_the_loss_is_quadratic() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    optimizer = KFAC(
        model, LOSS, lr=0.3, momentum=0.0, damping_rule=LevenbergMarquardt(period=1), fisher="exact", kl_clip=None
    )
    step(model, optimizer)
    found = optimizer.metrics()
    assert found["predicted_change"] == pytest.approx(found["actual_change"], rel=1e-5)


def test_clipped_shares() -> None:
    sizes = [p.numel() for p in network().parameters()]
    for eps, expected in ((1e-30, 1.0), (1e9, 0.0)):
        model = network()
        sophia = Sophia(model.parameters(), gamma=1e-20, eps=eps)
        sophia.metrics()
        step(model, sophia)
        assert sophia.metrics()["clipped"] == expected
        assert sum(number for _, number in sophia.cut["clipped"]) == sum(sizes)
    for bound, share in ((1e-9, 1.0), (1e9, 0.0)):
        model = network()
        psgd = PSGD(model.parameters(), max_rms=bound)
        psgd.metrics()
        step(model, psgd)
        assert psgd.metrics()["clipped"] == share


def test_refreshes_are_counted_at_their_times() -> None:
    model = network()
    optimizer = KFAC(model, LOSS, lr=0.01, inverse_update_period=Refresh(3, stagger=False))
    counts = []
    for number in range(7):
        step(model, optimizer, number)
        counts.append(optimizer.metrics()["refreshes"])
    assert counts == [2, 2, 2, 4, 4, 4, 6]
    model = network()
    sophia = Sophia(model.parameters(), curvature_update_period=2)
    for number in range(4):
        step(model, sophia, number)
    assert sophia.metrics()["refreshes"] == 2 * len(list(model.parameters()))


@pytest.mark.parametrize("name", ["KFAC", "SOAP", "SOAPMuon", "Shampoo", "KLShampoo", "SPlus", "GaLore"])
def test_failures_are_counted_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = made(name, model, lr=0.01, inverse_update_period=1)
    step(model, optimizer)
    good = optimizer.metrics()
    assert good["refreshes"] > 0 and good["failures"] == 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise SolverError("no")

    with monkeypatch.context() as patch:
        for function in ("linalg.eigh", "geqrf", "linalg.svd", "linalg.cholesky_ex", "linalg.cholesky"):
            patch.setattr(f"torch.{function}", fail)
        step(model, optimizer, 1)
    failed = optimizer.metrics()
    assert failed["failures"] > 0 and failed["refreshes"] == good["refreshes"] and failed["steps"] == 2
    step(model, optimizer, 2)
    assert optimizer.metrics()["refreshes"] > good["refreshes"]


def test_a_bound_that_is_active_most_of_the_time_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = KFAC(model, LOSS, lr=0.1, kl_clip=1e-9)
    with caplog.at_level(logging.WARNING):
        for number in range(40):
            step(model, optimizer, number)
    assert optimizer.metrics()["bound"] > 0.9
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "metrics()" in caplog.text


@pytest.mark.parametrize("name", ["KFAC", "SOAP", "HessianFree"])
def test_the_monitor_reads_the_same(name: str) -> None:
    model = network()
    optimizer = made(name, model, lr=0.01)
    monitor = curvature.Monitor(
        model, LOSS, batch(), every=1, quantities="trace", optimizer=optimizer, max_fraction=None
    )
    for number in range(3):
        step(model, optimizer, number)
        row = monitor.step()
        assert row is not None
        found = optimizer.metrics()
        assert {key: row[key] for key in found} == found


def test_copies_and_loggers(tmp_path: Any) -> None:
    model = network()
    optimizer = SOAP(model.parameters(), lr=0.01)
    optimizer.metrics()
    step(model, optimizer)
    for other in (copy.deepcopy(optimizer), pickle.load(io.BytesIO(pickle.dumps(optimizer)))):
        assert other.metrics()["refreshes"] == optimizer.metrics()["refreshes"]
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for key, value in optimizer.metrics().items():
            writer.add_scalar(f"optimizer/{key}", value, optimizer.steps)
