"""Do the scripts of the documentation run under torchrun, with the numbers of one process?"""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("distributed.md", "sharded.md")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def scripts() -> dict[str, str]:
    """The blocks that begin with their name and their command."""
    found = {}
    for page in PAGES:
        text = (ROOT / "docs" / "how-to" / page).read_text()
        for block in re.findall(r"^```python no-run\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if head := re.match(r"# (\w+\.py): torchrun --nproc-per-node \d+ \1\n", block):
                found[head[1]] = block
    return found


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: x for key, entry in items for k, x in tensors(entry, f"{path}/{key}").items()}


def kfac(folder: Path) -> dict[str, Tensor]:
    return tensors(torch.load(folder / "kfac.pt", weights_only=True)["model"])


def soap(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint of shards."""
    state = dcp.FileSystemReader(folder / "soap").read_metadata().state_dict_metadata
    sizes = {key: entry for key, entry in state.items() if key.startswith("model.")}
    weights = {key.removeprefix("model."): torch.empty(x.size, dtype=torch.float64) for key, x in sizes.items()}
    whole: dict[str, Any] = {"model": weights}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist says
        dcp.load(whole, checkpoint_id=folder / "soap", no_dist=True)
    return tensors(whole)


def look(folder: Path) -> dict[str, Tensor]:
    assert "eigenvalues" in (folder / "report.html").read_text().lower()
    return tensors(torch.load(folder / "look.pt", weights_only=True))


#: Script -> processes, what it leaves behind, and how near it is to one process: SOAP turns bases by QR, and has
#: none of its own choice, since its matrices are square.
RUNS: dict[str, tuple[int, Callable[[Path], dict[str, Tensor]], float]] = {
    "train_kfac.py": (4, kfac, 1e-10),
    "train_soap.py": (2, soap, 1e-8),
    "look.py": (2, look, 1e-8),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_script_says_under_torchrun_what_it_says_in_one_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, read, tolerance = RUNS[name]
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
        (folder / name).write_text(scripts()[name])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=together, env=environment, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr[-4000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in one.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(alone)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(name, run_name="__main__")
    found, expected = read(together), read(alone)
    assert found.keys() == expected.keys() and found
    gaps = {key: float((found[key] - x).abs().max()) for key, x in expected.items()}
    assert {key: gap for key, gap in gaps.items() if not gap < tolerance} == {}


def test_every_script_is_run() -> None:
    assert scripts().keys() == RUNS.keys()
