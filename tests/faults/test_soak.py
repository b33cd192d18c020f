"""Is a run that is killed again and again the run that nobody killed, and does memory stay where it is?

``python -m tests.faults.soak`` prints the figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.faults.injection import same
from tests.faults.soak import (
    CALLS,
    METHODS,
    Training,
    calls_apart,
    contents,
    growth,
    live,
    objects,
    runs,
    sizes_of_calls,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from Linux's /proc")

#: Python's objects that may come and go between two looks (entries of caches of torch, frames of the test itself). One
#: that is kept by every step or call would be thousands.
SPARE_OBJECTS = 50
#: Pages that the allocators of C and of torch may take after the warm-up, in bytes. A kept tensor has at least half a
#: KiB with its Python object and its storage: one for each of 9,000 steps, or three for each of 2,000 calls, are more.
SPARE_BYTES = 2**21


@pytest.mark.parametrize("name", METHODS)
def test_steps_keep_no_objects(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        run, found = Training(name, 110), []
        for _ in range(110):
            run.step()
            if run.done in (50, 110):
                found.append(objects())
    assert found[1] - found[0] < SPARE_OBJECTS


@pytest.mark.parametrize("name", CALLS)
def test_calls_keep_no_objects(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        assert growth(sizes_of_calls(name, 75, 15), 15)[1] < SPARE_OBJECTS


def test_what_is_kept_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    monkeypatch.setitem(CALLS, "keeping", lambda number: kept.extend(torch.zeros(1) for _ in range(2)))
    grown = growth(sizes_of_calls("keeping", 75, 15), 15)[1]
    assert grown >= 100 > SPARE_OBJECTS  # 120 are kept; others may go meanwhile


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    path, steps = tmp_path / "killed.pt", 150
    # While it writes its second file, or on the way to the third: however slow the machine is, there is a first one.
    first = live("EKFAC", steps, path, 25, kill=("save", 0.0), occurrence=2)
    assert not first.ended and path.exists()
    second = live("EKFAC", steps, path, 50)
    assert second.ended and second.first > 0
    with torch.random.fork_rng(devices=[]):
        whole = Training("EKFAC", steps)
        for _ in range(steps):
            whole.step()
        whole.save(tmp_path / "whole.pt")
    assert same(contents(tmp_path / "whole.pt"), contents(path))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", METHODS)
def test_ten_thousand_steps(name: str) -> None:
    for _, whole, again in runs([name], 10_000, 500, 10):
        grown = growth(whole.sizes, 1000)
        assert again.same and again.kills >= 3
        assert grown[0] < SPARE_BYTES and grown[1] < SPARE_OBJECTS


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CALLS)
def test_three_thousand_calls(name: str) -> None:
    grown = growth(calls_apart(name, 3000, 500), 1000)
    assert grown[0] < SPARE_BYTES and grown[1] < SPARE_OBJECTS
