"""Run one function in several processes that form a group, and bring back what each returned.

Importing torch and the packages takes a process seconds, so ranks are forked from two that have done it: even and odd
ranks from another one each, since the order of sets of strings differs between processes as it does between machines.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
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
#: What the functions that are run import.
PRELOADED = ("pytest", "precond", "curvature", "torch.distributed.checkpoint", "torch.distributed.fsdp")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its result, or the traceback of its error; its exit code is negative where it was killed."""

    result: Any
    error: str | None
    code: int | None


def ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """``function(*arguments)`` on each rank of a gloo group: what every rank returned, in the order of the ranks.

    Checks of a kind share a launch, and so the models that they train.

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
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        torch.save((function.__module__, function.__qualname__, arguments, environment), place / "task")
        for rank in range(world_size):
            print(folder, world_size, rank, file=parent(rank % 2).stdin, flush=True)
        try:
            codes = wait(place, world_size, timeout, grace)
        finally:
            for rank in range(world_size):
                end(place, rank)
        return [outcome(place, rank, codes[rank]) for rank in range(world_size)]


_parents: dict[int, subprocess.Popen[str]] = {}


def parent(number: int) -> subprocess.Popen[str]:
    """A process that forks ranks, started when it is first needed; it ends with this one."""
    if number not in _parents:
        command = [sys.executable, "-m", "tests.distributed_run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        _parents[number] = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, text=True)
        atexit.register(_parents[number].kill)
    return _parents[number]


def wait(place: Path, world_size: int, timeout: float, grace: float) -> list[int]:
    """The exit codes of the ranks; those that have not ended in time are killed."""
    every = range(world_size)
    while not all((place / f"pid{rank}").exists() for rank in every):
        assert all(process.poll() is None for process in _parents.values()), "a process that forks ranks has ended"
        time.sleep(0.02)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and None in (codes := [code(place, rank) for rank in every]):
        if any(codes):
            deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.02)
    for rank in every:
        end(place, rank)
    return [code(place, rank) or 0 for rank in every]


def code(place: Path, rank: int) -> int | None:
    """The exit code of a rank, negative where a signal killed it; ``None`` while it lives."""
    file = place / f"code{rank}"
    return int(file.read_text()) if file.exists() else None


def end(place: Path, rank: int) -> None:
    """Kill a rank that has not ended, and see it end."""
    file = place / f"pid{rank}"
    while file.exists() and code(place, rank) is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
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
    module, name, arguments, environment = torch.load(place / "task", weights_only=False)
    os.environ.clear()
    os.environ.update(environment)
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


def write(file: Path, number: int) -> None:
    """All of it at once."""
    draft = file.with_suffix(".draft")
    draft.write_text(str(number))
    draft.rename(file)


def serve() -> None:
    """Fork a rank for each line ``folder world_size rank`` that comes in, and note its exit code when it ends."""
    for module in PRELOADED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    for line in sys.stdin:
        folder, world_size, rank = line.split()
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():
            write(Path(folder) / f"pid{rank}", pid)
            _, status = os.waitpid(pid, 0)
            write(Path(folder) / f"code{rank}", os.waitstatus_to_exitcode(status))
            os._exit(0)
        work(folder, world_size, rank)
        return  # and end as any process does


if __name__ == "__main__":
    serve()
