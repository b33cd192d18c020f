"""What does the planner say before there are processes? Its counts beside measured ones are in ``test_sharded``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond


def mlp() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3, bias=False))


def test_one_process_sends_nothing_and_keeps_all() -> None:
    found = precond.plan(mlp(), world_size=1, optimizer=precond.SOAP)
    assert found.sent == found.received == [0] and set(found.owners.values()) == {0}
    # Two moments, and a factor with its basis for each axis of a matrix.
    numbers = 2 * (48 + 6 + 18) + 2 * (64 + 36 + 36 + 9)
    assert found.state == [4 * numbers] and found.weights == [8 * (48 + 6 + 18)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_what_is_sent_is_received(world_size: int) -> None:
    found = precond.plan(mlp(), world_size=world_size, optimizer=lambda p: precond.Shampoo(p, momentum=0.9))
    alone = precond.plan(mlp(), world_size=1, optimizer=lambda p: precond.Shampoo(p, momentum=0.9))
    assert sum(found.sent) == sum(found.received)
    assert sum(found.state) == sum(alone.state) and sum(found.weights) == sum(alone.weights)
    assert sum(found.work) == sum(alone.work)


def test_replicas_do_the_same_again() -> None:
    hybrid = precond.plan(mlp(), world_size=6, replicas=3, optimizer=precond.SOAP)
    single = precond.plan(mlp(), world_size=2, optimizer=precond.SOAP)
    assert (hybrid.sent, hybrid.state, hybrid.owners) == (single.sent, single.state, single.owners)


def test_half_precision_goes_out_narrow_and_comes_back_wide() -> None:
    wide = precond.plan(mlp(), world_size=2, optimizer=precond.SOAP)
    narrow = precond.plan(mlp().bfloat16(), world_size=2, optimizer=precond.SOAP)
    assert sum(narrow.sent) == sum(wide.sent) * 3 / 4 and narrow.state == wide.state


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
    with pytest.raises(TypeError, match="model"):
        precond.plan(mlp(), world_size=2, optimizer=precond.KFAC)
