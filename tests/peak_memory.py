"""The peak of a program's resident memory, for scripts that tests start."""

from __future__ import annotations

from pathlib import Path


def peak_kib() -> int:
    """KiB, on Linux; ``ru_maxrss`` would begin with the peak of the process that started the program."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
