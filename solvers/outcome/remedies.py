"""What a decomposition needed to succeed, told to whoever listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: The remedies by name: decompositions that succeeded in float64 only, or only after a perturbation of rounding size.
FLOAT64, PERTURBED = "decompositions_in_float64", "decompositions_perturbed"

_heard: ContextVar[Counter[str] | None] = ContextVar("remedies that are listened to", default=None)


def note(remedy: str) -> None:
    """Count a remedy, where somebody listens.

    Args:
        remedy: Its name.
    """
    heard = _heard.get()
    if heard is not None:
        heard[remedy] += 1


@contextmanager
def remedies(into: Counter[str] | None = None) -> Iterator[Counter[str]]:
    """Within the block, count the remedies of all decompositions of this thread.

    Args:
        into: Where to count; a new counter by default. A block inside another one counts for itself.
    """
    heard: Counter[str] = Counter() if into is None else into
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)
