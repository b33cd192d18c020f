"""Run one function in several processes that form a group, and bring back what each returned."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Warnings of torch's own imports, as in ``pyproject.toml``.
TOLERATED = ("`torch.jit.script` is deprecated",)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its result, or the traceback of its error; its exit code is negative where it was killed."""

    result: Any
    error: str | None
    code: int | None


def ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """``function(*arguments)`` on each rank of a gloo group: what every rank returned, in the order of the ranks.

    One launch costs seconds (each process imports torch), so let one function make many checks.

    Args:
        function: Defined at the top of an importable module; warnings are errors in it, as in the suite.
        world_size: Number of processes, one thread each.
        *arguments: Whatever pickles; each rank loads its own copy.
        timeout: Seconds after which all processes are killed.
    Raises:
        AssertionError: With the traceback of each rank that failed or was killed.
    """
    ended = outcomes(function, world_size, *arguments, timeout=timeout)
    failed = [f"rank {rank}, exit code {o.code}:\n{o.error}" for rank, o in enumerate(ended) if o.error or o.code != 0]
    if failed:
        raise AssertionError("\n".join(failed))
    return [o.result for o in ended]


def outcomes(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0, grace: float = 20.0
) -> list[Outcome]:
    """As :func:`ranks`, for checks where ranks fail: once one has failed the others have ``grace`` seconds to end."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.save((function.__module__, function.__qualname__, arguments), place / "task")
        command = [sys.executable, "-m", "tests.distributed_run", folder, str(world_size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment) for rank in range(world_size)]
        try:
            wait(processes, timeout, grace)
        finally:
            for process in processes:
                process.kill()  # does nothing to one that has ended
                process.wait()
        return [outcome(place, rank, process.returncode) for rank, process in enumerate(processes)]


def wait(processes: list[subprocess.Popen[bytes]], timeout: float, grace: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.02)


def outcome(place: Path, rank: int, code: int | None) -> Outcome:
    result, error = place / f"result{rank}", place / f"error{rank}"
    if result.exists():
        return Outcome(torch.load(result, weights_only=False), None, code)
    return Outcome(None, error.read_text() if error.exists() else "ended without a result", code)


def work(folder: str, world_size: str, rank: str) -> None:
    """The life of one process."""
    place = Path(folder)
    torch.set_num_threads(1)
    module, name, arguments = torch.load(place / "task", weights_only=False)
    try:
        function = getattr(importlib.import_module(module), name)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place / 'store'}",
            rank=int(rank),
            world_size=int(world_size),
            timeout=timedelta(seconds=60),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in TOLERATED:
                warnings.filterwarnings("ignore", message, DeprecationWarning)
            result = function(*arguments)
        dist.barrier()
        torch.save(result, place / f"unfinished{rank}")
        (place / f"unfinished{rank}").rename(place / f"result{rank}")
        dist.destroy_process_group()
    except BaseException:
        (place / f"error{rank}").write_text(traceback.format_exc())
        # A process whose peers are gone may hang in the clean-up of the group.
        os._exit(1)


if __name__ == "__main__":
    work(*sys.argv[1:])
