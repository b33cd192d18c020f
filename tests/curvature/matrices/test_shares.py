"""Are matrices of data that are shared out over processes those of one process that has all data?"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import curvature
from tests.curvature.matrices import shared_runs as runs
from tests.distributed_run import ranks

#: What each case is told, on the rank where it went wrong and on the other.
TOLD = {
    "vectors": ("ValueError: a vector is not the same in all 2 processes.*same seed",) * 2,
    "product": ("ShareFailed: the pass over the data of rank 1 failed.*nan", "NonFiniteLossError: The loss is nan"),
    "estimate": ("ShareFailed: the pass over the data of rank 1 failed.*nan", "NonFiniteLossError: The loss is nan"),
    "nothing": ("No term of the loss counts in any batch",) * 2,
    "rows": ("NotImplementedError: block .* keeps more of the data than means.*process_group",) * 2,
    "resume": ("ValueError: resume keeps the sums of one process",) * 2,
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_find_what_one_process_finds() -> None:
    found = ranks(runs.on_two, 2, timeout=500.0)
    for number, rank in enumerate(found):
        assert len(rank["gaps"]) == len(runs.SHARES) * len(runs.LOSSES) * len(runs.MATRICES)
        assert {name: gap for name, gap in rank["gaps"].items() if not gap < 1e-12} == {}
        assert {name: gap for name, gap in rank["estimates"].items() if not gap < 1e-10} == {}
        assert {name: gap for name, gap in rank["influences"].items() if not gap < 1e-12} == {}
        # The standard error of 400 draws; half of them were the same on both ranks, it would be about 1.4 times that.
        assert rank["draws"]["full"] < 0.15 and rank["draws"]["layer"] < 0.15
        assert rank["draws"]["full same"] and rank["draws"]["layer same"]
        told = rank["refusals"]
        assert {name: told[name] for name, words in TOLD.items() if not re.search(words[number], told[name])} == {}


def test_a_process_group_is_checked_at_the_border() -> None:
    data: Any = (torch.ones(2, 3), torch.ones(2, 1))
    for door in (curvature.hessian, curvature.ggn, curvature.fisher, curvature.gradient_covariance):
        with pytest.raises(TypeError, match="process_group is a process group such as"):
            door(nn.Linear(3, 1), nn.MSELoss(), data, process_group=2)
    with pytest.raises(ValueError, match="no batches"):
        curvature.hessian(nn.Linear(3, 1), nn.MSELoss(), [])
