"""Hugging Face's ``Trainer`` under ``torchrun``: equal to the plain loop, killed and resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.long, pytest.mark.distributed]


def launched(method: str, what: str, folder: Path) -> tuple[int, str]:
    module = "tests.precond.integrations.trainer_processes"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*launcher, method, what, str(folder)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    return ended.returncode, ended.stderr[-4000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["KFAC", "SOAP"])
def test_the_trainer_in_two_processes(method: str, tmp_path: Path) -> None:
    numbers: dict[str, dict[str, Any]] = {}
    for what in ("whole", "killed", "resumed"):
        code, errors = launched(method, what, tmp_path)
        if what == "killed":
            assert code != 0 and "SIGKILL" in errors
        else:
            assert code == 0, errors
            numbers[what] = torch.load(tmp_path / f"{what}.numbers")
        if what == "whole":
            shutil.rmtree(tmp_path / "out")
    assert numbers["whole"].pop("moved") > 0.1
    assert numbers["whole"] == {"plain": 0.0, "ranks": 0.0, "batches": 6}
    # They are killed at the end of the fourth step, before its checkpoint, and go on from the second.
    assert numbers["resumed"] == {"whole": 0.0, "ranks": 0.0, "batches": 4}
