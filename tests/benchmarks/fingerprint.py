"""What a kept run depends on besides its name: the sources, torch and Python, as one short text."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("solvers", "curvature", "precond")


def digest(files: Iterable[Path]) -> str:
    """Sixteen hexadecimal digits of some files, their names included, and of the versions of torch and Python."""
    found = hashlib.sha256(f"{torch.__version__} {platform.python_version()}".encode())
    for path in sorted(files):
        content = path.read_bytes()
        found.update(f"\0{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:16]


@cache
def fingerprint(*benchmarks: str, packages: bool = True) -> str:
    """Of modules of ``tests/benchmarks``, and of our three packages unless the run is of another library.

    >>> fingerprint("defaults") != fingerprint("defaults", packages=False)
    True
    """
    files = [Path(__file__).parent / f"{name}.py" for name in benchmarks]
    if packages:
        files += [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return digest(files)
