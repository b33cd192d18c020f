"""Are steps on four ranks, in shards and replicas of shards, those of one process for a CNN and a transformer?"""

from __future__ import annotations

import pytest

from tests.benchmarks.world_sizes import FULL_RANK, deviations

#: Of each kind; rounding errors in what has no gradient are not divided by the smallest of eps and damping.
METHODS = ["KFAC", "EKFAC", "SOAP(eps=1e-5)", "Muon", "Shampoo(damping=1e-8)"]


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["HSDP 2x2", pytest.param("FSDP 4", marks=pytest.mark.long)])
def test_models_on_four_ranks_take_the_steps_of_one_process(way: str) -> None:
    """Relative to the largest move; with groups, a tied head, and padding of which ranks have unequal parts."""
    table = deviations(METHODS, [way], ["cnn", "transformer"])
    assert {name: row[way] for name, row in table.items() if not row[way] < 1e-10} == {}
    table = deviations(["SOAP", "SOAPMuon"], [way], [FULL_RANK])
    assert {name: row[way] for name, row in table.items() if not row[way] < 1e-12} == {}
