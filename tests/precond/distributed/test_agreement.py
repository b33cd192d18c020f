"""Do all ranks take the same decision, whatever one of them alone has seen?"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import curvature
from precond import (
    EKFAC,
    KBFGS,
    KFAC,
    SENG,
    SOAP,
    AdaHessian,
    Cholesky,
    Eigh,
    LevenbergMarquardt,
    Newton,
    QuadraticModel,
    SMWNaturalGradient,
    methods,
)
from precond.distributed.ranks import OtherRankFailed
from solvers import SolverError, Subspace
from tests.distributed_run import ranks
from tests.precond.distributed.checks import (
    Net,
    alone,
    averaged,
    distance,
    in_parallel,
    make,
    mine,
    parameters,
    same,
    vectors,
)

pytestmark = pytest.mark.distributed

GRADIENT_METHODS = [method.name for method in methods() if method.needs == "grad"]
#: Options of K-FAC that judge a step by its loss.
JUDGED: dict[str, dict[str, Any]] = {
    "quadratic model": {"lr": 1.0, "step_size": QuadraticModel(factor_period=2)},
    "damping rule": {"damping_rule": LevenbergMarquardt()},
    "rejection": {"lr": 3.0, "kl_clip": None, "damping_rule": LevenbergMarquardt(reject_steps=True)},
}


def backward(model: nn.Module, call: Callable[[Tensor], Tensor], step: int, loss_fn: nn.Module) -> None:
    x, y = vectors()[step]
    model.zero_grad()
    loss_fn(call(x[mine(16)]), y[mine(16)]).backward()


def skips() -> dict[str, Any]:
    """One rank's gradient overflows after it was averaged."""
    out = {}
    by_name = {method.name: method.cls for method in methods()}
    for name in (*GRADIENT_METHODS, "KFAC", "EKFAC"):
        model, cls, loss_fn = Net(), by_name[name], nn.CrossEntropyLoss()
        own = (model, loss_fn) if cls.needs == "layers" else (model.parameters(),)
        optimizer = cls(*own, lr=0.01, process_group=dist.group.WORLD)
        seen = []
        for step in range(3):
            backward(model, model, step, loss_fn)
            averaged(model)
            if step == 1 and dist.get_rank() == 1:
                assert model.first.weight.grad is not None
                model.first.weight.grad[0, 0] = float("inf")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            seen.append((parameters(model), [str(w.message) for w in caught], optimizer.skipped))
        out[name] = seen
    return out


def no_factor(*args: Any, **kwargs: Any) -> Any:
    raise SolverError("no factor")


@contextmanager
def failing(on: int) -> Iterator[None]:
    """No Cholesky factorisation succeeds on one rank."""

    own = Cholesky.power
    if dist.get_rank() == on:
        Cholesky.power = no_factor  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cholesky.power = own  # type: ignore[method-assign]


def failures() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for fraction in (1.0, 0.5):
        model = Net()
        parallel = DistributedDataParallel(model)
        optimizer = make("kfac exact", parallel, memory_fraction=fraction, inverse_update_period=1)
        counts = []
        for step in range(4):
            backward(model, parallel, step, optimizer.loss_fn)
            with failing(1 if step == 2 else -1):
                optimizer.step()
            counts.append({name: p.failures for name, p in optimizer.preconditioners.items()})
        out[f"{fraction}"] = (counts, parameters(model))
    return out


def soap_fails() -> Any:
    """A decomposition that fails on one rank alone."""
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    optimizer = SOAP(model.parameters(), lr=0.01, inverse_update_period=1, process_group=dist.group.WORLD)
    seen = []
    own = Eigh.basis, Subspace.improve
    for step in range(4):
        backward(model, model, step, loss_fn)
        averaged(model)
        if step == 2 and dist.get_rank() == 1:
            Eigh.basis = Subspace.improve = no_factor  # type: ignore[method-assign, assignment]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        Eigh.basis, Subspace.improve = own  # type: ignore[method-assign]
        seen.append((parameters(model), [str(w.message) for w in caught]))
    return seen


def raising() -> dict[str, Any]:
    """One rank's loss has no curvature; then the same batch is tried again."""
    model = Net()
    parallel = DistributedDataParallel(model)
    optimizer = make("kfac exact", parallel)
    train_from(optimizer, model, parallel, range(2))
    before, state = parameters(model), optimizer.state_dict()
    x, y = vectors()[2]
    x, y = x[mine(16)], y[mine(16)]
    optimizer.zero_grad()
    z = parallel(x)
    loss = optimizer.loss_fn(z, y)
    (loss - 2 * optimizer.loss_fn(z, y.flip(0)) if dist.get_rank() == 1 else loss).backward()
    try:
        optimizer.step()
        error: Exception | None = None
    except Exception as raised:
        error = raised
    unchanged = same(before, parameters(model)) and str(state) == str(optimizer.state_dict())
    train_from(optimizer, model, parallel, range(2, 4))
    return {"error": (type(error), str(error)), "unchanged": unchanged, "after": parameters(model)}


def train_from(optimizer: Any, model: nn.Module, call: Any, steps: range) -> None:
    for step in steps:
        backward(model, call, step, optimizer.loss_fn)
        optimizer.step()


class Odd(Net):
    """On rank 1 a weight is also used in a way that no layer rule covers."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if dist.get_rank() == 1:
            out = out * (1 + 0.1 * torch.sin(self.first.weight).sum())
        return out


def distrusted() -> Any:
    model = Odd()
    parallel = DistributedDataParallel(model)
    optimizer = make("kfac exact", parallel)
    train_from(optimizer, model, parallel, range(3))
    return sorted(optimizer.preconditioners), parameters(model)


def refusals() -> dict[str, str]:
    """What each refusal says."""
    loss_fn = nn.CrossEntropyLoss()
    out = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
            out[name] = "nothing"
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"

    def step(cls: Any, **options: Any) -> None:
        model = Net()
        parallel = DistributedDataParallel(model)
        optimizer = cls(parallel, loss_fn, lr=0.1, **options)
        backward(model, parallel, 0, loss_fn)
        optimizer.step()

    def closure(cls: Any) -> None:
        model = Net()
        parallel = DistributedDataParallel(model)
        x, y = vectors()[0]
        cls(model.parameters()).step(lambda: loss_fn(parallel(x), y))

    def missing() -> None:
        model = Net()
        optimizer = SOAP(model.parameters(), lr=0.1, process_group=dist.group.WORLD)
        backward(model, model, 0, loss_fn)
        averaged(model)
        if dist.get_rank() == 1:
            model.scale.grad = None
        optimizer.step()

    def unwrapped() -> None:
        model = Net()
        optimizer = KFAC(model, loss_fn, lr=0.1)
        backward(model, model, 0, loss_fn)
        optimizer.step()

    def joined() -> None:
        model = Net()
        parallel = DistributedDataParallel(model)
        optimizer = KFAC(parallel, loss_fn, lr=0.1)
        with parallel.join():
            backward(model, parallel, 0, loss_fn)
            optimizer.step()

    def synchronized(after: bool) -> None:
        model: nn.Module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        model = model if after else nn.SyncBatchNorm.convert_sync_batchnorm(model)
        KFAC(model.eval(), loss_fn, lr=0.1)  # takes no statistics of others
        optimizer = KFAC(model.train(), loss_fn, lr=0.1, process_group=dist.group.WORLD)
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer.step()

    def converted() -> None:
        """After the first step, and in the midst of products with a matrix."""
        model: nn.Module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
        optimizer = KFAC(model, loss_fn, lr=0.1, process_group=dist.group.WORLD)
        backward(model, model, 0, loss_fn)
        averaged(model)
        optimizer.step()
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        note("synchronized in training", lambda: backward(model, model, 1, loss_fn))

    def matrices() -> None:
        x, y = vectors()[0]
        x, y = x[mine(16)], y[mine(16)]
        plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
        matrix = curvature.hessian(plain, loss_fn, [(x, y)], process_group=dist.group.WORLD)
        vector = torch.ones(matrix.shape[1], dtype=torch.float64)
        matrix @ vector
        model = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
        note("synchronized matrix", lambda: matrix @ vector)
        note("synchronized alone", lambda: curvature.ggn(model, loss_fn, (x, y)) @ vector)
        note("synchronized report", lambda: curvature.report(model, loss_fn, (x, y)))
        curvature.ggn(model.eval(), loss_fn, (x, y)) @ vector

    converted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the statistics of a batch are part of the loss
        matrices()
    note("synchronized", lambda: synchronized(False))
    note("synchronized later", lambda: synchronized(True))
    note("joined", joined)
    note("smw", lambda: step(SMWNaturalGradient))
    note("seng", lambda: step(SENG))
    note("fraction", lambda: step(KFAC, memory_fraction=0.3))
    note("kbfgs", lambda: step(KBFGS, memory_fraction=0.5))
    note("newton", lambda: closure(Newton))
    note("adahessian", lambda: AdaHessian(Net().parameters(), lr=0.1, process_group=dist.group.WORLD))
    note("group", lambda: SOAP(Net().parameters(), lr=0.1, process_group=2))
    note("missing", missing)
    note("unwrapped", unwrapped)
    only = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    note("other group", lambda: step(EKFAC, process_group=only))
    note("own model", lambda: unwrapped_with(only))
    return out


def unwrapped_with(group: Any) -> None:
    model = Net()
    optimizer = KFAC(model, nn.CrossEntropyLoss(), lr=0.1, process_group=group)
    backward(model, model, 0, optimizer.loss_fn)
    optimizer.step()


def everything() -> dict[str, Any]:
    return {
        "skips": skips(),
        "failures": failures(),
        "raising": raising(),
        "soap": soap_fails(),
        "distrusted": distrusted(),
        "refusals": refusals(),
        "judged": {
            f"{name}, {fraction}": in_parallel("kfac exact", Net(), vectors(), {}, memory_fraction=fraction, **options)
            for name, options in JUDGED.items()
            for fraction in (1.0, 0.5)
        },
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks(everything, 2, timeout=400)


@pytest.mark.parametrize("name", [*GRADIENT_METHODS, "KFAC", "EKFAC"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(found: list[dict[str, Any]], name: str) -> None:
    for rank, result in enumerate(found):
        (first, _, none), (second, told, one), (third, _, _) = result["skips"][name]
        assert (none, one) == (0, 1)
        assert same(first, second) and not same(second, third)
        assert any(("in another process" in message) == (rank == 0) and "skips a step" in message for message in told)
        assert same(third, found[0]["skips"][name][2][0])


def test_a_factorisation_that_fails_on_one_rank_leaves_the_inverse_on_all(found: list[dict[str, Any]]) -> None:
    for fraction in ("1.0", "0.5"):
        (counts, values), (others, other) = (result["failures"][fraction] for result in found)
        assert counts == others
        assert same(values, other)
        assert set(counts[1].values()) == {0} == set(counts[3].values())
        assert 1 in counts[2].values()


def test_a_decomposition_that_fails_on_one_rank_alone_moves_none(found: list[dict[str, Any]]) -> None:
    for result in found:
        (_, _), (before, _), (after, told), (last, _) = result["soap"]
        assert same(before, after) and not same(after, last)
        assert any("a decomposition failed in some processes and not in others" in message for message in told)
        assert same(last, found[0]["soap"][-1][0])


def test_an_error_on_one_rank_is_one_on_all_and_changes_nothing(found: list[dict[str, Any]]) -> None:
    (one, told), (other, own) = (result["raising"]["error"] for result in found)
    assert one is OtherRankFailed and "failed on rank 1 of the group" in told
    assert other is ValueError and "positive and negative multiples of the loss" in own
    assert all(result["raising"]["unchanged"] for result in found)
    assert same(found[0]["raising"]["after"], found[1]["raising"]["after"])
    assert distance(found[0]["raising"]["after"], alone("kfac exact", Net(), vectors())) < 1e-10


def test_what_one_rank_distrusts_all_distrust(found: list[dict[str, Any]]) -> None:
    (names, values), (others, other) = (result["distrusted"] for result in found)
    assert (
        names == others == ["first.bias", "first.weight", "norm.weight+norm.bias", "scale", "second.weight+second.bias"]
    )
    assert same(values, other)


@pytest.mark.parametrize("name", JUDGED)
def test_a_step_is_judged_by_the_data_of_all(found: list[dict[str, Any]], name: str) -> None:
    expected = alone("kfac exact", Net(), vectors(), **JUDGED[name])
    for fraction in (1.0, 0.5):
        values = found[0]["judged"][f"{name}, {fraction}"]
        assert same(values, found[1]["judged"][f"{name}, {fraction}"])
        assert distance(values, expected) < 1e-10


REFUSALS = {
    "smw": "NotImplementedError: SMWNaturalGradient does not run in several processes: .* rows of its own batch",
    "seng": "NotImplementedError: SENG does not run in several processes: .* rows of its own batch",
    "fraction": r"ValueError: memory_fraction=0.3 does not divide 2 processes; with so many it is 1/2, 1\.",
    "kbfgs": "NotImplementedError: KBFGS needs the averages of all blocks in every process",
    "newton": "NotImplementedError: the closure of Newton calls a model in DistributedDataParallel",
    "adahessian": "NotImplementedError: AdaHessian differentiates the loss of its closure itself",
    "group": "TypeError: process_group is a torch.distributed.ProcessGroup such as .*, not 2",
    "missing": "RuntimeError: some parameters have a gradient on some ranks only",
    "unwrapped": "UserWarning: KFAC runs in one of 2 processes, with the curvature of its own data alone",
    "other group": r"ValueError: process_group holds ranks \[\d\], but DistributedDataParallel .* over \[0, 1\]",
    "own model": "nothing",
    "synchronized": "NotImplementedError: KFAC: 1 is a SyncBatchNorm, whose passes send messages.*SOAP, Shampoo, Muon",
    "synchronized in training": "NotImplementedError: KFAC: 1 is a SyncBatchNorm",
    "synchronized matrix": "NotImplementedError: curvature: 1 is a SyncBatchNorm",
    "synchronized alone": "NotImplementedError: curvature: 1 is a SyncBatchNorm",
    "synchronized report": "NotImplementedError: curvature: 1 is a SyncBatchNorm",
    "synchronized later": "NotImplementedError: KFAC: 1 is a SyncBatchNorm, whose passes send messages",
    "joined": r"NotImplementedError: DistributedDataParallel.join\(\) lets ranks without data stay away",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_refused_in_words(found: list[dict[str, Any]], name: str) -> None:
    for result in found:
        assert re.match(REFUSALS[name], result["refusals"][name])
