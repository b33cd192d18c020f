"""Prints or writes the tables of costs: ``python -m tests.benchmarks.harness [--write] [--only TEXT]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.benchmarks.harness import tables

PAGE = Path(__file__).parents[3] / "docs" / "performance.md"


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    read.add_argument("--only", default="", help="operations and optimizers whose name holds this")
    read.add_argument("--workloads", default="mlp,cnn,vit,gpt")
    read.add_argument("--seconds", type=float, default=2.0, help="CPU time of each measurement")
    read.add_argument("--skip", choices=("steps", "curvature", "memory"), default=[], action="append")
    chosen = read.parse_args()
    torch.set_num_threads(1)
    workloads = chosen.workloads.split(",")
    for name, make in (("curvature", tables.curvature), ("steps", tables.steps), ("memory", tables.memory)):
        if name in chosen.skip:
            continue
        lines: list[str] = []
        for line in make(workloads, chosen.only, chosen.seconds):
            lines.append(line)
            print(line, flush=True)
            if chosen.write and len(lines) > 2:  # row by row: the run may take hours, and may be ended
                PAGE.write_text(tables.put(PAGE.read_text(encoding="utf-8"), name, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
