"""No rule may be wrong unnoticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from curvature.estimation.plan import BlockPlan

# Parameters of `hidden_uses` in problems.py, whose uses no recorder can see.
HIDDEN = {"only", "also.weight"}


@pytest.fixture(autouse=True)
def _rules_explain_the_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which the recorded uses of a parameter do not add up to its gradient.

    The library then takes that parameter's gradients by autograd, so the result would be right and hide a wrong rule.
    """
    distrusted: set[str] = set()
    original = BlockPlan.distrust

    def distrust(self: BlockPlan, reasons: Mapping[str, str]) -> bool:
        distrusted.update(reasons)
        return original(self, reasons)

    monkeypatch.setattr(BlockPlan, "distrust", distrust)
    yield
    assert distrusted <= HIDDEN, f"the rules do not explain the gradients of {sorted(distrusted - HIDDEN)}"
