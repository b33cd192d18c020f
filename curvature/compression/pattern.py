"""Which weights may be removed."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """What pruning removes from each matrix.

    Attributes:
        fraction: Share of the weights that is removed.
        n: Of every ``m`` neighbouring inputs of a row, ``n`` are kept; ``None`` where any weight may go.
        m: See ``n``.
        units: Whether whole output units go, with their biases.
    """

    fraction: float
    n: int | None = None
    m: int | None = None
    units: bool = False

    @classmethod
    def parse(cls, sparsity: float | str, units: bool = False) -> Pattern:
        """A fraction, or ``"n:m"``; the fraction 0 removes nothing.

        Raises:
            ValueError: If it is neither, or out of range.
        """
        if isinstance(sparsity, str):
            found = re.fullmatch(r"(\d+):(\d+)", sparsity)
            n, m = (int(found[1]), int(found[2])) if found else (0, 0)
            if not 0 < n < m <= 16:
                raise ValueError(f"sparsity must be a fraction or 'n:m' with 0 < n < m <= 16, got {sparsity!r}.")
            if units:
                raise ValueError(f"units=True removes whole units; sparsity={sparsity!r} is a pattern within them.")
            return cls(1 - n / m, n, m)
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be a fraction from 0 to below 1 or 'n:m', got {sparsity!r}.")
        return cls(float(sparsity), units=units)

    @property
    def of_m(self) -> tuple[int, int]:
        """``(n, m)``."""
        assert self.n is not None and self.m is not None
        return self.n, self.m
