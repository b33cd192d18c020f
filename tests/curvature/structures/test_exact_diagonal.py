"""Is the diagonal that of the matrix, for every model, loss and way to use a parameter?"""

from __future__ import annotations

import pytest
import torch

from curvature import fisher
from curvature.estimation.collector import Collector
from tests.curvature import dense_reference as dense
from tests.curvature.problems import PROBLEMS


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_diagonal_is_exact(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    expected = dense.curvature(problem, kind).diagonal()
    assert expected.norm() > 1e-6  # the reference itself must not be empty
    got = fisher(
        problem.model, problem.loss_fn, problem.data, kind=kind, structure="diagonal", class_dim=problem.class_dim
    )
    torch.testing.assert_close(got.diagonal(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "layer"])
def test_signals_give_the_same_together_and_one_by_one(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS["cnn"]()

    def found(at_once: int) -> torch.Tensor:
        monkeypatch.setattr(Collector, "_together", lambda self, groups, output: at_once)
        matrix = fisher(problem.model, problem.loss_fn, problem.data, kind="exact", structure=structure)
        return matrix.to_dense()

    alone = found(1)
    for at_once in (2, 100):  # two at a time do not divide every number of classes
        torch.testing.assert_close(found(at_once), alone, rtol=1e-10, atol=1e-12)
