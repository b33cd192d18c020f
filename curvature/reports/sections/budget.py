"""The budget of a report, and how it is shared out among the sections.

A budget is in seconds or in products with a matrix; everything below is in that one unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from curvature.model.shares import Shares

#: Replaced in tests, so that time passes as they say.
clock: Callable[[], float] = time.perf_counter


class Budget:
    """An amount that is used up, by time passing or by products being counted.

    Args:
        seconds: Seconds that may pass.
        products: Products that may be made.
        shares: Processes that spend it together, by the clock of the first of them.

    Raises:
        ValueError: If both are given, or one is not a positive number.
    """

    def __init__(
        self, seconds: float | None = None, products: float | None = None, shares: Shares | None = None
    ) -> None:
        if seconds is not None and products is not None:
            raise ValueError(f"give budget={seconds} in seconds or products={products}, not both.")
        for name, amount in (("budget", seconds), ("products", products)):
            if amount is not None and not (isinstance(amount, (int, float)) and isfinite(amount) and amount > 0):
                raise ValueError(f"{name} is a positive number, or None for no limit, not {amount!r}.")
        self.seconds, self.products = seconds, products
        self.counted = 0.0
        self._shares = Shares() if shares is None else shares
        self._start = self._now()

    @property
    def unit(self) -> str:
        """The unit of the limit."""
        return "products" if self.products is not None else "seconds"

    @property
    def amount(self) -> float:
        """All of it; infinite without a limit."""
        limit = self.seconds if self.products is None else self.products
        return inf if limit is None else limit

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.amount < inf

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._start

    def _now(self) -> float:
        now: float = self._shares.first(clock())
        return now

    @property
    def spent(self) -> float:
        """The amount used so far."""
        return self.counted if self.products is not None else self.elapsed

    @property
    def left(self) -> float:
        """The amount left."""
        return max(0.0, self.amount - self.spent)

    def count(self, products: float) -> None:
        """Take note of products, or of passes that cost as much."""
        self.counted += products


@dataclass(frozen=True)
class Need:
    """The request of a section.

    Attributes:
        least: Below this it is not worth beginning.
        wanted: With this it is as exact as was asked for.
    """

    least: float
    wanted: float


def allot(needs: Sequence[Need], available: float) -> list[float]:
    """Share out an amount: the least to each in turn as far as it goes, then the rest in proportion.

    Args:
        needs: The most worthwhile first.
        available: The amount to share out.

    Returns:
        An amount for each; 0 for those that are cut.
    """
    granted = []
    for need in needs:
        enough = need.least <= available
        granted.append(need.least if enough else 0.0)
        available -= granted[-1]
    more = [need.wanted - need.least if grant else 0.0 for need, grant in zip(needs, granted, strict=True)]
    share = min(1.0, available / sum(more)) if sum(more) > 0 else 0.0
    return [grant + share * extra for grant, extra in zip(granted, more, strict=True)]
