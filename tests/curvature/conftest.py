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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One of the small problems is a batch norm in train mode on two batches; who is told so is a test of its own."""
    for item in items:
        if "residual_train" in item.nodeid:
            item.add_marker(pytest.mark.filterwarnings("ignore:not one loss"))
