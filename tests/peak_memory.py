"""Peaks of memory: of a process, for scripts that are started on their own, and of the tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_kib() -> int:
    """KiB, on Linux; ``ru_maxrss`` would begin with the peak of the process that started the program."""
    return _status("VmHWM")


def resident_kib() -> int:
    """KiB in use now, on Linux."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """Bytes of tensors made by ``run`` that were alive at once.

    A count, the same on every machine: the resident memory of a process also has kernels compiled for its processor,
    buffers of its threads, and pages that an allocator keeps.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most
