"""Does every method survive every kind of problem out of the box, and follow the scale of the loss?"""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("sklearn")

from torch import nn

from precond import Doubling
from tests.benchmarks.calls import read_call
from tests.benchmarks.defaults import GRID, METHODS, Results, Run, run, score
from tests.benchmarks.later_problems import LATER
from tests.benchmarks.small_problems import CONFIRM, PROBLEMS, TUNE

WITHOUT_LR = {"SINGD"}  # no default for it


@pytest.mark.parametrize("problem", PROBLEMS)
def test_nothing_crashes_or_diverges(problem: str) -> None:
    """Six steps under warm-up and decay, all methods of the table at their defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for method in METHODS:
            found = run(f"{method}(lr=0.1)" if method in WITHOUT_LR else method, problem, seed=0, steps=6)
            assert not found.error, (method, found.error)
            # A few steps may go up a little; those that run away go up by orders of magnitude.
            assert found.losses[-1] <= 2 * found.losses[0], (method, found.losses)


def test_calls_know_the_public_names_though_they_load_late() -> None:
    name, options = read_call("KFAC(curvature_update_period=Doubling(10), structures={nn.Embedding: {}})")
    assert name == "KFAC" and options == {"curvature_update_period": Doubling(10), "structures": {nn.Embedding: {}}}
    assert read_call("SOAP") == read_call("SOAP()") == ("SOAP", {})


def test_the_halves_share_nothing_and_are_all() -> None:
    assert TUNE.keys() | CONFIRM.keys() == PROBLEMS.keys() and not TUNE.keys() & CONFIRM.keys()
    assert len(TUNE) == len(CONFIRM) == 7
    assert len(LATER) == 8 and not LATER.keys() & PROBLEMS.keys()


def made(method: str, losses: list[float], seconds: float = 1.0, error: str = "") -> Run:
    return Run(method, "words", 0, 5 * (len(losses) - 1), losses, seconds, error)


def test_the_share_is_that_of_the_first_loss_at_the_target_and_a_miss_counts_two() -> None:
    assert made("a", [3.0, 2.0, 1.0, 0.5, 0.7]).share(1.0) == 0.5
    assert made("a", [3.0, 2.0, 1.0, 0.5, 0.7]).share(0.4) == 2.0
    assert made("a", [3.0, float("nan"), 1.0]).share(1.0) == 1.0
    assert made("a", [3.0, 0.1], error="ValueError").share(1.0) == 2.0
    assert made("a", [3.0, 4.0]).failed and made("a", [3.0, float("nan")]).failed and not made("a", [3.0, 2.0]).failed


def test_scores_are_against_the_best_of_the_grid() -> None:
    results = Results(None)
    for i, method in enumerate(GRID):
        results.known[method, "words", 0] = made(method, [3.0, 2.0, 1.0 + i], seconds=2.0)
    results.known["SOAP", "words", 0] = made("SOAP", [3.0, 0.9, 0.8], seconds=6.0)
    found = score(results, "SOAP", ["words"], 1)
    assert (found.reached, found.steps, found.cost) == (1, pytest.approx(0.5), pytest.approx(3.0))
    assert found.seconds == pytest.approx(1.5) and not found.failures
