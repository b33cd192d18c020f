"""Does the launcher of the distributed tests bring back every rank's result, its error, its death?"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed_run import outcomes, ranks

pytestmark = pytest.mark.distributed


def total(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    mine = value * (1 + dist.get_rank())
    dist.all_reduce(mine)
    return dist.get_rank(), mine


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank alone")


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def hang() -> None:
    while True:
        time.sleep(0.1)


def test_each_rank_returns_its_result() -> None:
    for rank, (told, summed) in enumerate(ranks(total, 2, torch.arange(3.0))):
        assert told == rank
        assert summed.tolist() == [0.0, 3.0, 6.0]


def test_an_error_comes_back_with_its_rank() -> None:
    with pytest.raises(AssertionError, match=r"rank 1, exit code 1:\n(.|\n)*ValueError: this rank alone"):
        ranks(fail_on_one, 2)


def test_a_killed_rank_ends_the_others() -> None:
    survivor, killed = outcomes(die_on_one, 2)
    assert killed.code == -signal.SIGKILL
    assert survivor.error is not None


def test_nothing_outlives_the_timeout() -> None:
    (ended,) = outcomes(hang, 1, timeout=0.5)
    assert ended.code == -signal.SIGKILL
