"""Do bound and damping follow the scale of the loss by themselves?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import precond
from curvature.losses import AutogradLoss, SumOfLosses, loss_for
from precond import (
    EKFAC,
    KFAC,
    SINGD,
    SOAP,
    TNT,
    LevenbergMarquardt,
    Loop,
    LossDamping,
    NaturalGradient,
    Newton,
    QuadraticModel,
    TrustRegion,
)
from precond.step.loss_level import FollowingDamping, LossLevel
from solvers import Dense, Tikhonov
from tests.precond.step.test_trust_region import data, fisher, network

FOLLOWING: list[Any] = [KFAC, EKFAC, TNT]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def regression(k: int) -> tuple[Tensor, Tensor]:
    x, _ = data(k)
    return x, 300 * x[:, :3] + 1000


def trained(
    make: Callable[..., Any], loss_fn: Any, backward: Callable[..., Any], batches: Any = regression, steps: int = 6
) -> Tensor:
    model = network()
    optimizer = make(model, loss_fn, lr=0.1)
    for k in range(steps):
        optimizer.zero_grad()
        backward(model, loss_fn, *batches(k))
        optimizer.step()
    optimizer.detach()
    return flat(model)


def plain(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> None:
    loss_fn(model(x), y).backward()


@pytest.mark.parametrize("make", FOLLOWING)
@pytest.mark.parametrize("factor", [1e-4, 7.0, 1e5])
def test_a_loss_times_a_number_is_the_same_run(make: Any, factor: float) -> None:
    def scaled(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> None:
        (factor * loss_fn(model(x), y)).backward()

    def raw(*given: Any, **options: Any) -> Any:  # what a number means is in units of C
        return make(*given, **options, damping=1e-2, kl_clip=TrustRegion(1e-2, lr=0.1))

    first = trained(make, nn.MSELoss(), plain)
    torch.testing.assert_close(trained(make, nn.MSELoss(), scaled), first, rtol=1e-9, atol=1e-9)
    assert (trained(raw, nn.MSELoss(), scaled) - trained(raw, nn.MSELoss(), plain)).norm() > 1e-3


@pytest.mark.parametrize("make", FOLLOWING)
def test_weights_of_a_sum_of_losses_are_numbers_too(make: Any) -> None:
    mean = trained(make, nn.MSELoss(), plain)
    parts = SumOfLosses({"y": (24.0, nn.MSELoss())})

    def named(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> None:
        loss_fn({"y": model(x)}, {"y": y}).backward()

    torch.testing.assert_close(trained(make, parts, named), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", FOLLOWING)
def test_accumulated_batches_are_one(make: Any) -> None:
    def halves(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> None:
        for part in (slice(0, 12), slice(12, 24)):
            (loss_fn(model(x[part]), y[part]) / 2).backward()

    def exact(*given: Any, **options: Any) -> Any:
        return make(*given, **options, fisher="exact")

    whole = trained(exact, nn.MSELoss(), plain)
    torch.testing.assert_close(trained(exact, nn.MSELoss(), halves), whole, rtol=1e-7, atol=1e-7)


def functional(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, own: bool, parts: int) -> None:
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        z = model(xs)
        if own:
            loss = loss_fn(z, ys)
        elif isinstance(loss_fn, nn.CrossEntropyLoss):
            loss = F.cross_entropy(z, ys, loss_fn.weight, ignore_index=-1, reduction=loss_fn.reduction)
        else:
            loss = F.binary_cross_entropy_with_logits(z, ys, reduction=loss_fn.reduction)
        (loss if loss_fn.reduction == "sum" else loss / parts).backward()


@pytest.mark.parametrize("make", FOLLOWING)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("what", ["mean", "sum", "weights", "binary"])
def test_a_function_after_the_model_is_the_same_run_as_the_module(make: Any, parts: int, what: str) -> None:
    """Labels are read off its gradient, so its value is known."""
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if what == "weights" else None
    loss_fn: Any = nn.CrossEntropyLoss(weight, ignore_index=-1, reduction="sum" if what == "sum" else "mean")
    if what == "binary":
        loss_fn = nn.BCEWithLogitsLoss()

    def batches(k: int) -> tuple[Tensor, Tensor]:
        x, _ = data(k)
        labels = torch.randint(3, (len(x),), generator=torch.Generator().manual_seed(k))
        if what == "binary":
            return x, F.one_hot(labels, 3).to(x.dtype)
        return x, torch.where(torch.arange(len(x)) % 5 == 0, -1, labels)

    runs = [
        trained(make, loss_fn, lambda *args, own=own: functional(*args, own=own, parts=parts), batches)
        for own in (True, False)
    ]
    torch.testing.assert_close(*runs, rtol=1e-11, atol=1e-13)


#: Losses by function with targets that no gradient shows, by their modules.
TOLD: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "squares": (nn.MSELoss(), F.mse_loss),
    "squares by hand": (nn.MSELoss(), lambda z, t: (z - t).square().mean()),
    "soft labels": (nn.CrossEntropyLoss(), lambda z, t: F.cross_entropy(z, t.softmax(1))),
    "mixed labels": (
        nn.CrossEntropyLoss(),
        lambda z, t: 0.3 * F.cross_entropy(z, t.argmax(1)) + 0.7 * F.cross_entropy(z, t.argmin(1)),
    ),
    "shares": (nn.BCEWithLogitsLoss(), lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid())),
}
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "soft labels": lambda t: t.softmax(1),
    "mixed labels": lambda t: 0.3 * F.one_hot(t.argmax(1), 3).double() + 0.7 * F.one_hot(t.argmin(1), 3).double(),
    "shares": torch.sigmoid,
}


@pytest.mark.parametrize("make", [*FOLLOWING, partial(KFAC, loop=Loop(capture="shadow"))])
@pytest.mark.parametrize("factor", [1.0, 1e4])
@pytest.mark.parametrize("name", TOLD)
def test_a_function_whose_value_tells_it_is_the_same_run_as_the_module(name: str, factor: float, make: Any) -> None:
    """So is its loss, which damping and bound follow."""
    loss_fn, function = TOLD[name]

    def module(model: nn.Module, given: Any, x: Tensor, y: Tensor) -> None:
        (factor * given(model(x), TARGETS.get(name, lambda t: t)(y))).backward()

    def by_function(model: nn.Module, given: Any, x: Tensor, y: Tensor) -> None:
        (factor * function(model(x), y)).backward()

    batches = lambda k: (data(k)[0], data(k)[0][:, :3].cos())  # noqa: E731
    runs = [trained(make, loss_fn, loop, batches) for loop in (module, by_function)]
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)  # the weight is a quotient of numbers


@pytest.mark.parametrize("make", FOLLOWING)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["mean", "sum"])
@pytest.mark.parametrize(
    ("module", "function"),
    [(nn.MSELoss, F.mse_loss), (nn.CrossEntropyLoss, F.cross_entropy)],
    ids=["squares", "labels"],
)
def test_an_optimizer_that_is_given_a_function_runs_as_with_its_module(
    module: Any, function: Any, options: dict[str, str], make: Any
) -> None:
    batches = (lambda k: (data(k)[0], 300 * data(k)[0][:, :3].cos())) if module is nn.MSELoss else data
    runs = [trained(make, given, plain, batches) for given in (module(**options), partial(function, **options))]
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", FOLLOWING)
def test_weights_of_examples_by_function_are_the_same_run_as_by_the_module(make: Any) -> None:
    weights = 1e4 * torch.arange(1.0, 25.0).double()

    def loop(of: Callable[..., Tensor] | None) -> Callable[..., None]:
        each = lambda given: of or given  # noqa: E731
        return lambda model, given, x, y: (each(given)(model(x), y) * weights).mean().backward()

    loss_fn = nn.CrossEntropyLoss(reduction="none")
    function = partial(F.cross_entropy, reduction="none")
    runs = [trained(make, loss_fn, loop(of), data) for of in (None, function)]
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", FOLLOWING)
def test_a_function_of_weight_zero_is_no_level_that_is_not_a_number(make: Any) -> None:
    def loop(model: nn.Module, given: Any, x: Tensor, y: Tensor) -> None:
        (given(z := model(x), y) + 0.0 * (z - 1).square().mean()).backward()

    runs = [trained(make, nn.CrossEntropyLoss(), run, data) for run in (plain, loop)]
    torch.testing.assert_close(*runs, rtol=1e-11, atol=1e-13)


def test_the_level_is_that_of_the_formula() -> None:
    values = [3.0, 2.0, 50.0, 1e9, 0.5, None, None, float("inf"), 0.1, None, 0.0, 0.2, 7.0, None]
    like, saved, level, latest = torch.zeros((), dtype=torch.float64), {}, 0.0, 0.0
    for k, value in enumerate(values):
        loss = None if value is None else torch.tensor(value, dtype=torch.float64)
        found = LossLevel.after(saved.get("level"), loss, like, saved.get("loss"))
        latest = value if value is not None and math.isfinite(value) else latest  # others say nothing
        level = latest if k == 0 else min(0.9 * level + 0.1 * latest, 1.01 * level)
        assert float(found.mean) == pytest.approx(level, rel=1e-12)
        saved = found.saved(like)
    older = LossLevel.after(saved["level"], None, like)  # of a state without the last loss
    assert older.mean == saved["level"] and older.saved(like) == {"level": saved["level"], "loss": 0}
    assert LossLevel.after(None, None, like).mean == LossLevel.after(torch.zeros(()), None, like).mean == 1
    assert LossLevel.after(torch.zeros(()), torch.tensor(5.0), like).mean == 5
    lost = LossLevel.after(None, torch.tensor(math.inf), like)
    assert lost.mean == 1 and lost.saved(like) == LossLevel.after(None, None, like).saved(like)
    assert lost.saved(like) == {"level": 0, "loss": 0}


@pytest.mark.parametrize("make", FOLLOWING)
def test_between_updates_the_last_loss_that_was_seen_stands(make: Any) -> None:
    """The average goes on in every step, not only in those that see a loss."""
    model, level, seen = network(), None, 0.0
    optimizer = make(model, nn.MSELoss(), lr=0.1, curvature_update_period=4)
    for k in range(10):
        x, y = regression(k)
        optimizer.zero_grad()
        loss = optimizer.loss_fn(model(x), 0.2**k * y)
        loss.backward()
        optimizer.step()
        seen = loss.item() if k % 4 == 0 else seen
        level = seen if level is None else min(0.9 * level + 0.1 * seen, 1.01 * level)
        assert float(optimizer.bound_level()) == pytest.approx(level, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_move_is_at_most_that_share_of_the_loss(momentum: float) -> None:
    model, c, active = network(), 1e-3, 0
    optimizer = NaturalGradient(
        model,
        nn.CrossEntropyLoss(),
        structure="dense",
        fisher="exact",
        curvature_ema=0.0,
        damping=1e-3,
        lr=0.5,
        momentum=momentum,
        kl_clip=TrustRegion(c, unit="loss"),
    )
    level = None
    for k in range(8):
        x, y = data(k)
        F, before = fisher(model, x, y), flat(model)
        loss = optimizer.loss_fn(model(x), y)
        value = loss.item()
        level = value if level is None else min(0.9 * level + 0.1 * value, 1.01 * level)
        promised = c * level
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m = flat(model) - before
        length = float(m @ (F + 1e-3 * torch.eye(len(F)).double()) @ m)
        assert length <= promised * (1 + 1e-9)
        active += length >= promised * (1 - 1e-9)
    assert active > 4


def test_the_damping_is_a_share_of_the_loss() -> None:
    model, (x, y) = network(), regression(0)
    same = copy.deepcopy(model)
    loss = nn.MSELoss()(model(x), y).item()
    for target, damping in ((model, LossDamping(0.3)), (same, 0.3 * loss)):
        optimizer = EKFAC(target, nn.MSELoss(), lr=0.1, damping=damping, fisher="exact")
        optimizer.loss_fn(target(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(flat(model), flat(same), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("period", [1, 3])
def test_a_resumed_run_goes_on(period: int) -> None:
    def run(model: nn.Module, optimizer: Any, steps: range) -> None:
        for k in steps:
            optimizer.zero_grad()
            plain(model, optimizer.loss_fn, *regression(k))
            optimizer.step()

    def make(model: nn.Module) -> Any:
        return KFAC(model, nn.MSELoss(), lr=0.1, curvature_update_period=period)

    whole, part = network(), network()
    run(whole, make(whole), range(7))
    first = make(part)
    run(part, first, range(4))
    rest = network()
    rest.load_state_dict(part.state_dict())
    second = make(rest)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(rest, second, range(4, 7))
    assert torch.equal(flat(rest), flat(whole))


def test_a_state_from_before_means_the_units_of_the_curvature() -> None:
    model = network()
    optimizer = KFAC(model, nn.MSELoss(), lr=0.1, damping=0.03, kl_clip=1e-3)
    plain(model, optimizer.loss_fn, *regression(0))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["kl_unit"], group["damping_unit"]
    other = KFAC(network(), nn.MSELoss(), lr=0.1)
    assert other.param_groups[0]["kl_unit"] == other.param_groups[0]["damping_unit"] == "loss"
    other.load_state_dict(saved)
    assert other.param_groups[0]["kl_unit"] == other.param_groups[0]["damping_unit"] == "curvature"


def test_losses_without_a_zero_count_as_one() -> None:
    assert loss_for(nn.MSELoss()).zero_when_perfect and loss_for(nn.CrossEntropyLoss()).zero_when_perfect
    assert not loss_for(nn.GaussianNLLLoss()).zero_when_perfect and not loss_for(nn.PoissonNLLLoss()).zero_when_perfect
    assert loss_for(SumOfLosses({"a": (1.0, nn.MSELoss())})).zero_when_perfect
    assert not loss_for(SumOfLosses({"a": (1.0, nn.MSELoss()), "b": (1.0, nn.PoissonNLLLoss())})).zero_when_perfect
    model = network()
    own = AutogradLoss(lambda z, y: (z - y).square().mean(), reduction="mean")
    optimizer = KFAC(model, own, lr=0.1)
    (0.5 * optimizer.loss_fn(model(regression(0)[0]), regression(0)[1])).backward()
    optimizer.step()
    assert float(optimizer.state[next(model.parameters())]["level"]) == pytest.approx(0.5)


def test_groups_have_units_of_their_own() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "damping": 0.5},
        {"params": model[2].parameters(), "damping": LossDamping(0.1)},
    ]
    optimizer = KFAC(model, nn.MSELoss(), lr=0.1, params=groups)
    assert [(g["damping"], g["damping_unit"]) for g in optimizer.param_groups] == [(0.5, "curvature"), (0.1, "loss")]
    plain(model, optimizer.loss_fn, *regression(0))
    optimizer.step()


def test_what_has_no_such_unit_refuses_it() -> None:
    model = network()
    for make in (SOAP, Newton):
        with pytest.raises(ValueError, match="does not see the loss"):
            make(model.parameters(), kl_clip=TrustRegion(1e-2, unit="loss"))
    for options in ({"step_size": QuadraticModel()}, {"damping_rule": LevenbergMarquardt()}):
        with pytest.raises(ValueError, match="need a damping in units of C"):
            KFAC(model, nn.MSELoss(), lr=0.1, damping=LossDamping(0.1), **options)  # type: ignore[arg-type]
        assert KFAC(model, nn.MSELoss(), lr=0.1, **options).param_groups[0]["damping_unit"] == "curvature"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without unit='loss'"):
        KFAC(model, nn.MSELoss(), lr=0.1, step_size=QuadraticModel(), kl_clip=TrustRegion(1e-2, unit="loss"))
    with pytest.raises(ValueError, match="need a damping in units of C"):
        SINGD(model, nn.MSELoss(), lr=0.1, damping=LossDamping(0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit is one of curvature, loss"):
        TrustRegion(1e-2, unit="seconds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction"):
        LossDamping(-1.0)


@pytest.mark.parametrize("make", FOLLOWING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_fit_with_singular_factors_goes_on(make: Any, dtype: torch.dtype) -> None:
    """A damping that follows the loss to zero would leave factors of low rank to their rounding errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)
        x = torch.randn(4, 2, dtype=dtype) @ torch.randn(2, 6, dtype=dtype)
    y = model(x).detach()
    optimizer = make(model, nn.MSELoss(), lr=0.1, inverse_update_period=1)
    for k in range(8):
        optimizer.zero_grad()
        plain(model, optimizer.loss_fn, x, y + 0.1 * (k == 0))
        optimizer.step()
        optimizer.state[next(model.parameters())]["level"].fill_(1e-25)  # as after some hundred steps
    assert optimizer.metrics()["skipped"] == 0
    assert bool(flat(model).isfinite().all())


def test_the_damping_has_a_floor_by_the_curvature() -> None:
    op = Dense(torch.diag(torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64)))
    for lam, found in ((0.5, 0.5), (0.0, 2e-8)):
        damped = FollowingDamping(Tikhonov(torch.tensor(lam)))(op).to_dense()
        torch.testing.assert_close(damped, op.to_dense() + found * torch.eye(4).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "TNT"])
def test_a_level_that_is_not_a_number_is_told_and_moves_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 2).double(), nn.CrossEntropyLoss()
    optimizer = getattr(precond, name)(model, loss_fn, lr=0.1)
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    step()
    level = optimizer.state[model.weight]["level"]
    kept, before = level.clone(), [p.detach().clone() for p in model.parameters()]
    level.fill_(torch.nan)
    with pytest.raises(ValueError, match="damping must be finite"):
        step()
    assert all(map(torch.equal, before, model.parameters()))
    level.copy_(kept)
    step()
    assert not torch.equal(before[0], model.weight)


def test_the_level_is_kept_where_the_first_parameter_is_frozen_later() -> None:
    """The flat form of a checkpoint leaves out what is kept for frozen parameters."""

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for k in steps:
            optimizer.zero_grad()
            plain(model, optimizer.loss_fn, *regression(k))
            optimizer.step()

    form = StateDictOptions(flatten_optimizer_state_dict=True)
    model, other = network(), network()
    optimizer, again = (KFAC(x, nn.MSELoss(), lr=0.1) for x in (model, other))
    train(model, optimizer, range(2))
    model[0].requires_grad_(False)
    train(model, optimizer, range(2, 4))
    assert [p for p in model.parameters() if "level" in optimizer.state[p]] == [model[2].weight]
    other.load_state_dict(model.state_dict())
    other[0].requires_grad_(False)
    set_optimizer_state_dict(other, again, get_optimizer_state_dict(model, optimizer, options=form), options=form)
    train(model, optimizer, range(4, 6))
    train(other, again, range(4, 6))
    assert torch.equal(flat(model), flat(other))
