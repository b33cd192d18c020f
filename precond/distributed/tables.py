"""Bytes by rank, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def amounts(rows: Mapping[str, Sequence[float]]) -> list[str]:
    """Lines of a table: what, and its mean and largest number of bytes over the ranks."""
    lines = [f"{'per rank':32}{'mean':>12}{'largest':>12}"]
    for name, values in rows.items():
        lines.append(f"{name:32}{_size(sum(values) / len(values)):>12}{_size(max(values)):>12}")
    return lines


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError
