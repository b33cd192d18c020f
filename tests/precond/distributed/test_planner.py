"""What does the planner say before there are processes? Its counts beside measured ones are in ``test_sharded``
and ``test_messages``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond import EKFAC, KFAC, NaturalGradient


def mlp() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3, bias=False))


def test_one_process_sends_nothing_and_keeps_all() -> None:
    found = precond.plan(mlp(), world_size=1, optimizer=precond.SOAP)
    assert found.sent == found.received == [0] and set(found.owners.values()) == {0}
    # Two moments and the last direction, the rate of each parameter, and a factor with its basis for each axis.
    numbers = 3 * (48 + 6 + 18) + 3 + 2 * (64 + 36 + 36 + 9)
    assert found.state == [4 * numbers] and found.weights == [8 * (48 + 6 + 18)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_what_is_sent_is_received(world_size: int) -> None:
    found = precond.plan(mlp(), world_size=world_size, optimizer=lambda p: precond.Shampoo(p, momentum=0.9))
    alone = precond.plan(mlp(), world_size=1, optimizer=lambda p: precond.Shampoo(p, momentum=0.9))
    assert sum(found.sent) == sum(found.received)
    assert sum(found.state) == sum(alone.state) and sum(found.weights) == sum(alone.weights)
    assert sum(found.work) == sum(alone.work)


def test_work_is_that_of_matrices_and_of_polar_factors() -> None:
    """A moment of a square parameter is no matrix of an axis, and wide matrices cost more than square ones."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(n, 64, bias=False) for n in (64, 64, 256, 256, 256, 256)))
    owners = precond.plan(model, world_size=3, optimizer=precond.Muon).owners
    wide = [rank for name, rank in owners.items() if name[0] in "2345"]
    assert sorted(map(wide.count, range(3))) == [1, 1, 2]
    soap = precond.SOAP(model.parameters())
    n, numel = 64, 64 * 64
    assert soap.work(model[0].weight, soap.param_groups[0]) == numel + 4 * (n**3 + n * numel)


def test_replicas_do_the_same_again() -> None:
    hybrid = precond.plan(mlp(), world_size=6, replicas=3, optimizer=precond.SOAP)
    single = precond.plan(mlp(), world_size=2, optimizer=precond.SOAP)
    assert (hybrid.sent, hybrid.state, hybrid.owners) == (single.sent, single.state, single.owners)


def test_half_precision_goes_out_narrow_and_comes_back_wide() -> None:
    wide = precond.plan(mlp(), world_size=2, optimizer=precond.SOAP)
    narrow = precond.plan(mlp().bfloat16(), world_size=2, optimizer=precond.SOAP)
    assert sum(narrow.sent) == sum(wide.sent) * 3 / 4 and narrow.state == wide.state


def test_local_shards_send_nothing_and_keep_smaller_matrices() -> None:
    """Rows are a parameter of their own: of (6, 8) three in each of two processes, of (3, 6) two and one."""
    found = precond.plan(mlp(), world_size=2, optimizer=lambda p: precond.SOAP(p, shards="local"))
    assert found.sent == found.received == [0, 0] and found.owners == {}
    # Two moments and the last direction, and the rate of each parameter.
    moments = [3 * (3 * 8 + 3 + 2 * 6) + 3, 3 * (3 * 8 + 3 + 1 * 6) + 3]
    matrices = [2 * (9 + 64) + 2 * (4 + 36), 2 * (9 + 64) + 2 * 36]  # one row has a matrix for its columns alone
    assert found.state == [4 * (a + b) for a, b in zip(matrices, moments, strict=True)]
    assert str(found).splitlines()[0].endswith(f"{len(list(mlp().parameters()))} parameters")
    assert str(found).splitlines()[-1].startswith("each rank works on its own rows; the largest share")


def test_it_prints_a_table_and_a_time() -> None:
    found = precond.plan(mlp(), world_size=2, optimizer=precond.SOAP)
    lines = str(found).splitlines()
    assert lines[0] == "2 processes, parameters cut among 2, 3 parameters" and "sent in a step" in lines[2]
    assert found.seconds(bandwidth=1e9, flops=1e12) == max(found.sent) / 1e9 + 2 * max(found.work) / 1e12


def test_what_it_does_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="positive multiple of replicas; got world_size=4, replicas=3"):
        precond.plan(mlp(), world_size=4, replicas=3, optimizer=precond.SOAP)
    for method in (precond.MFAC, precond.Newton):
        with pytest.raises(TypeError, match=f"{method.__name__} has no owners of sharded parameters"):
            precond.plan(mlp(), world_size=2, optimizer=method)
    with pytest.raises(ValueError, match=r"memory_fraction=0\.5 is an option of methods that learn from layers"):
        precond.plan(mlp(), world_size=2, optimizer=precond.SOAP, memory_fraction=0.5)
    with pytest.raises(ValueError, match=r"replicas=2 are copies .*; KFAC runs in DistributedDataParallel"):
        precond.plan(mlp(), world_size=2, replicas=2, optimizer=precond.KFAC)
    with pytest.raises(ValueError, match="does not divide 4 processes"):
        precond.plan(mlp(), world_size=4, optimizer=precond.KFAC, memory_fraction=0.3)
    with pytest.raises(NotImplementedError, match="keeps the rows of its own batch"):
        precond.plan(mlp(), world_size=2, optimizer=precond.SENG)
    with pytest.raises(NotImplementedError, match="KBFGS needs the averages of all blocks in every process"):
        precond.plan(mlp(), world_size=2, optimizer=precond.KBFGS, memory_fraction=0.5)
    with pytest.raises(TypeError, match="keeps one matrix of the whole model"):
        dense = functools.partial(precond.NaturalGradient, structure="dense")
        precond.plan(mlp(), world_size=2, optimizer=dense)


class Mixed(nn.Module):
    """Layers of several kinds: an embedding, a grouped convolution, a norm, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 4, 3, groups=2)
        self.norm, self.head, self.scale = nn.LayerNorm(4), nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(self.embed(x).mT).mT)).mean(1) * self.scale


@pytest.mark.parametrize("method", [KFAC, EKFAC, precond.TNT, precond.SINGD, NaturalGradient, precond.KBFGS])
@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"structure": "unit"}], ids=str)
def test_the_blocks_of_a_plan_are_those_of_a_run(method: Any, options: dict[str, Any]) -> None:
    if options and method is not NaturalGradient:
        return
    torch.manual_seed(0)
    model = Mixed()
    own = {"fisher": "exact", **options} if method is not precond.KBFGS else {}
    optimizer = method(model, nn.CrossEntropyLoss(), lr=0.01, **own)
    optimizer.loss_fn(model(torch.randint(11, (5, 7))), torch.randint(3, (5,))).backward()
    optimizer.step()
    found = precond.plan(Mixed(), world_size=1, optimizer=functools.partial(method, **own))
    estimators = {name: p.estimator for name, p in optimizer.preconditioners.items()}
    assert found.owners.keys() == estimators.keys()
    if method not in (precond.SINGD, precond.KBFGS):  # which learn an inverse
        means = [m.value for e in estimators.values() for m in e.means().values() if m.value is not None]
        assert found.factors == [sum(value.nbytes for value in means)]
    assert set(found.owners.values()) == {0} and found.balance == 1


def test_a_plan_leaves_the_model_alone_and_tells_a_time() -> None:
    with torch.device("meta"):
        model = Mixed()
    before = [dict(vars(module)) for module in model.modules()]
    found = precond.plan(model, world_size=4, optimizer=KFAC, memory_fraction=0.25)
    assert [dict(vars(module)) for module in model.modules()] == before
    lines = str(found).splitlines()
    assert lines[0] == "4 processes, each block kept by 1 (memory_fraction=1/4), 4 blocks" and len(lines) == 11
    waiting = max(found.stepping) + max(found.updating) / 2 + max(found.refreshing) / 5
    late = found.messages["step"] + found.messages["update"] / 2 + found.messages["refresh"] / 5
    done = 2 * (max(found.applying) + max(found.work) / 5)
    periods = {"curvature_update_period": 2, "inverse_update_period": 5}
    time = found.seconds(bandwidth=1e6, flops=1e9, latency=1e-3, **periods)
    assert abs(time - (waiting / 1e6 + late * 1e-3 + done / 1e9)) < 1e-12
