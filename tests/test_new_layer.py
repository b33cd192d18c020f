"""The acceptance check of the page on new layers fails where the rule is not used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from curvature.layers import RULES
from tests.test_documentation import script

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "new-layer.md").read_text(encoding="utf-8")
RULE = 'return LinearSite(x, tuple(weight.shape), ref, None, recorder.layout(x), "einsum")'


@pytest.fixture(autouse=True)
def _no_rule_stays() -> Iterator[None]:
    yield
    RULES.pop(torch.einsum, None)


def run(page: str) -> None:
    exec(compile(script(page), "new-layer.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("instead", "why"),
    [
        (RULE.replace("(x, ", "(x.flip(0), "), "rule einsum does not explain the gradient: gradients by autograd"),
        (RULE.replace("(x, ", "(2 * x, "), "rule einsum does not explain the gradient: gradients by autograd"),
        ("return None", "no rule for einsum: gradients by autograd"),
    ],
)
def test_the_check_fails_where_the_rule_is_not_used(instead: str, why: str) -> None:
    assert PAGE.count(RULE) == 1
    with pytest.raises(AssertionError, match=why):
        run(PAGE.replace(RULE, instead))


def test_a_permuted_view_passes_with_its_rule_used() -> None:
    """The output of the page's layer with its axes exchanged, as einsum returns it."""
    model = PAGE.replace('"ni,oi->no"', '"ni,oi->on"').replace("x, self.weight)", "x, self.weight).T")
    site = """
    class Columns(LinearSite):
        def gradients(self, gradient):
            return super().gradients(gradient.mT)

    """ + RULE.replace("LinearSite", "Columns")
    page = model.replace(RULE, site.strip())
    assert page.count('"ni,oi->on"') == 3
    run(page)
