"""Does the wheel work in an environment of its own, with the newest and the lowest versions of the others?"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compatibility import matrix

ROOT = Path(__file__).resolve().parents[2]


def test_the_lowest_versions_are_those_of_the_setup() -> None:
    asked = dict(re.findall(r'"(numpy|scipy|tqdm)>=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert {name: version.removesuffix(".0") for name, version in matrix.LOWEST["3.11"].items()} == asked


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_wheel_in_an_environment_of_its_own() -> None:
    command = [sys.executable, "-m", "tests.compatibility.matrix"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3500)
    assert ended.returncode == 0, ended.stderr[-4000:]
    rows = ended.stdout.splitlines()[2:]
    if any("not installed" in row for row in rows):
        pytest.skip(rows[-1])  # an index without these versions, or none
    assert len(rows) == 2 and all("| works, " in row for row in rows), ended.stdout
