"""Pruning: the surgeon's closed form, exact minima for the weights that stay, and the patterns."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from curvature.compression.factors import layer_curvature
from curvature.compression.obs import prune_matrix
from curvature.compression.pattern import Pattern
from solvers import Kronecker
from tests.curvature.compression.references import form, spd


def _setting(m, n, seed=0, coupled=True):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    A = spd(n, generator)
    B = spd(m, generator) if coupled else torch.eye(m, dtype=torch.float64)
    return W, A, B, layer_curvature("W", Kronecker(B, A), 0.0)


def _best_without(W, A, B, gone):  # type: ignore[no-untyped-def]
    """The least form when the flat entries ``gone`` are zero, and its weights: Lagrange's conditions, densely."""
    C = torch.kron(B, A)
    inverse = torch.linalg.inv(C)
    gone = list(gone)
    w = W.flatten()[gone]
    move = -inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], w)
    value = (W.flatten() + move).view_as(W)
    return form(W - value, A, B), value


@pytest.mark.parametrize("seed", range(4))
def test_one_weight_is_the_surgeons(seed):
    """The cheapest single removal of all, with the closed form of what the others do."""
    W, A, B, curvature = _setting(2, 3, seed)
    value, mask = prune_matrix(W, curvature, Pattern(1 / 6), 0, 1, 1e-12, 50)
    costs = {q: _best_without(W, A, B, [q])[0] for q in range(6)}
    best = min(costs, key=costs.__getitem__)
    assert not mask.flatten()[best] and int(mask.sum()) == 5
    assert torch.allclose(value, _best_without(W, A, B, [best])[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("free", [0, 1])
def test_what_stays_is_at_the_minimum_given_what_went(coupled, free):
    W, A, B, curvature = _setting(5, 9, coupled=coupled)
    value, mask = prune_matrix(W, curvature, Pattern(0.5), free, 4, 1e-13, 200)
    gone = (~mask).flatten().nonzero().flatten().tolist()
    assert len(gone) == round(0.5 * 5 * (9 - free))
    assert mask[:, 9 - free :].all()
    assert torch.allclose(value, _best_without(W, A, B, gone)[1], rtol=0, atol=1e-9)
    assert torch.equal(value != 0, mask)


def test_two_of_four_is_the_best_pattern_of_a_row():
    """One row, one group: the pattern with the least cost of all six."""
    for seed in range(6):
        W, A, B, curvature = _setting(1, 4, seed)
        value, mask = prune_matrix(W, curvature, Pattern.parse("2:4"), 0, 1, 1e-13, 50)
        best = min(combinations(range(4), 2), key=lambda gone: _best_without(W, A, B, gone)[0])
        assert sorted((~mask[0]).nonzero().flatten().tolist()) == list(best)
        assert torch.allclose(value, _best_without(W, A, B, best)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_group_keeps_n_of_m(pattern, n, m, rounds):
    W, _, _, curvature = _setting(6, 16)
    value, mask = prune_matrix(W, curvature, Pattern.parse(pattern), 0, rounds, 1e-8, 100)
    assert torch.equal(mask.view(6, -1, m).sum(-1), torch.full((6, 16 // m), n))
    assert torch.equal(value != 0, mask)


def test_whole_units_go_with_their_biases():
    W, A, B, curvature = _setting(6, 5)
    value, mask = prune_matrix(W, curvature, Pattern.parse(1 / 6, units=True), 1, 1, 1e-13, 100)
    rows = (~mask).all(1).nonzero().flatten().tolist()
    assert len(rows) == 1 and torch.equal(mask.any(1), mask.all(1))
    costs = {i: _best_without(W, A, B, range(5 * i, 5 * i + 5))[0] for i in range(6)}
    assert rows == [min(costs, key=costs.__getitem__)]
    assert torch.allclose(value, _best_without(W, A, B, range(5 * rows[0], 5 * rows[0] + 5))[1], rtol=0, atol=1e-9)


def test_more_rounds_cost_no_more_on_average():
    once = often = 0.0
    for seed in range(5):
        W, A, B, curvature = _setting(8, 12, seed)
        once += form(W - prune_matrix(W, curvature, Pattern(0.6), 0, 1, 1e-10, 200)[0], A, B)
        often += form(W - prune_matrix(W, curvature, Pattern(0.6), 0, 8, 1e-10, 200)[0], A, B)
    assert often < once


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan"), "2-4", "4:2", "4:4", "0:4", True, None])
def test_patterns_that_mean_nothing_are_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity must be"):
        Pattern.parse(sparsity)


def test_units_have_no_pattern_within():
    with pytest.raises(ValueError, match="units=True"):
        Pattern.parse("2:4", units=True)
