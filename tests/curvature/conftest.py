"""No rule may be wrong unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from curvature.estimation.plan import Plan

# Parameters of `hidden_uses` in problems.py, whose uses no recorder can see.
HIDDEN = {"only", "also.weight"}


@pytest.fixture(autouse=True)
def _rules_explain_the_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which the recorded uses of a parameter do not add up to its gradient.

    The library then takes that parameter's gradients by autograd, so the result would be right and hide a wrong rule.
    """
    distrusted: set[str] = set()
    original = Plan.distrust

    def distrust(self: Plan, names: Iterable[str]) -> bool:
        names = set(names)
        distrusted.update(names)
        return original(self, names)

    monkeypatch.setattr(Plan, "distrust", distrust)
    yield
    assert distrusted <= HIDDEN, f"the rules do not explain the gradients of {sorted(distrusted - HIDDEN)}"
