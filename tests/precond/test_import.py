"""What does importing precond load beyond torch? Only its own files, and not much of Python's."""

from __future__ import annotations

from tests.solvers.test_import import loaded


def test_importing_loads_little_beyond_torch() -> None:
    before, after = loaded("import torch"), loaded("import torch, precond")
    foreign = {name.partition(".")[0] for name in after - before} - {"precond", "curvature", "solvers"}
    # Modules of Python's own that take milliseconds; a package of others would take tenths of a second.
    assert foreign <= {"fractions", "hmac", "html", "secrets"}
