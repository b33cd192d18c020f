"""Rounding: equal to the published algorithms entry by entry, and never better than what enumeration finds."""

from __future__ import annotations

import pytest
import torch

import curvature.compression.rounding as rounding
from curvature.compression.factors import layer_curvature
from curvature.compression.grid import Grid
from curvature.compression.rounding import round_matrix
from solvers import Dense, Diagonal, Kronecker
from tests.curvature.compression.references import best_on_grid, form, gptq, spd, two_sided


def _damped(A: torch.Tensor, fraction: float) -> torch.Tensor:
    return A + fraction * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)


def _nearest(levels):  # type: ignore[no-untyped-def]
    return lambda x, i, j: levels.nearest(x.view(1, 1), slice(j, j + 1), slice(i, i + 1))[0, 0]


@pytest.mark.parametrize("block", [3, 4, 128])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 6), (6, 1), (8, 8)])
def test_two_sided_rounding_equals_the_recursion_entry_by_entry(generator, monkeypatch, block, shape):
    monkeypatch.setattr(rounding, "_BLOCK", block)
    m, n = shape
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    A, B = spd(n, generator), spd(m, generator)
    levels = Grid(3).levels(W)
    curvature = layer_curvature("W", Kronecker(B, A), 0.01)
    found = round_matrix(W, levels, curvature, by_activation=False)
    assert torch.allclose(found, two_sided(W, _damped(A, 0.01), _damped(B, 0.01), _nearest(levels)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupled", [False, True])
def test_inputs_with_the_largest_second_moment_are_rounded_last(generator, coupled):
    W = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    A = spd(7, generator)
    B = spd(5, generator) if coupled else torch.eye(5, dtype=torch.float64)
    levels = Grid(3).levels(W)
    found = round_matrix(W, levels, layer_curvature("W", Kronecker(B, A), 0.01), by_activation=True)
    order = torch.argsort(A.diagonal(), descending=True)
    sorted_A, own = _damped(A, 0.01)[order][:, order], levels.take(order)
    expected = two_sided(W[:, order], sorted_A, _damped(B, 0.01), _nearest(own))
    assert torch.allclose(found[:, order], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", ["row", "tensor", 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_by_inputs_alone_is_gptq(generator, monkeypatch, group, symmetric):
    monkeypatch.setattr(rounding, "_BLOCK", 4)
    W = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    A = spd(9, generator)
    levels = Grid(3, symmetric, group, "range").levels(W)
    identity = Diagonal(torch.ones(6, dtype=torch.float64))
    found = round_matrix(W, levels, layer_curvature("W", Kronecker(identity, Dense(A)), 0.01), by_activation=False)
    # GPTQ goes from the first column to the last, so its columns are those in reverse.
    back = torch.arange(8, -1, -1)
    reverse = levels.take(back)
    theirs = gptq(W[:, back], _damped(A, 0.01)[back][:, back], _nearest(reverse))[:, back]
    assert torch.allclose(found, theirs, rtol=0, atol=1e-10)
    assert (found - W).abs().max() > 0


def test_the_identity_for_the_outputs_changes_nothing(generator):
    W = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    A, levels = spd(6, generator), Grid(3).levels(W)
    one, other = (
        round_matrix(W, levels, layer_curvature("W", Kronecker(B, Dense(A)), 0.01))
        for B in (Diagonal(torch.ones(5, dtype=torch.float64)), Dense(torch.eye(5, dtype=torch.float64)))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2), (1, 6), (2, 4)])
def test_between_the_optimum_by_enumeration_and_plain_rounding(shape):
    m, n = shape
    ours = plain = 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(m, n, generator=generator, dtype=torch.float64)
        A, B = spd(n, generator), spd(m, generator)
        levels = Grid(2).levels(W)
        found = round_matrix(W, levels, layer_curvature("W", Kronecker(B, A), 0.0))
        values = [[[float((c - 2) * levels.scale[i, j]) for c in range(4)] for j in range(n)] for i in range(m)]
        assert form(W - found, A, B) >= best_on_grid(W, A, B, values) - 1e-12
        ours += form(W - found, A, B)
        plain += form(W - levels.nearest(W), A, B)
    assert ours < plain


@pytest.mark.parametrize("shape", [(1, 4), (2, 4)])
def test_without_interactions_the_optimum_is_found(generator, shape):
    m, n = shape
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    A, B = (torch.diag(torch.rand(d, generator=generator, dtype=torch.float64) + 0.1) for d in (n, m))
    levels = Grid(2).levels(W)
    found = round_matrix(W, levels, layer_curvature("W", Kronecker(B, A), 0.0))
    values = [[[float((c - 2) * levels.scale[i, j]) for c in range(4)] for j in range(n)] for i in range(m)]
    assert form(W - found, A, B) == pytest.approx(best_on_grid(W, A, B, values), rel=1e-12)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_bias_takes_up_the_mean_of_the_error(generator, coupled):
    """A column off the grid ends at the minimum of the form given the rounded ones."""
    W = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    A = spd(7, generator)
    B = spd(4, generator) if coupled else torch.eye(4, dtype=torch.float64)
    levels = Grid(3).levels(W[:, :6])
    curvature = layer_curvature("W", Kronecker(B, A), 0.01)
    found = round_matrix(W, levels, curvature, free=1)
    assert torch.equal(found[:, :6], levels.nearest(found[:, :6]))
    gradient = _damped(B, 0.01) @ (W - found) @ _damped(A, 0.01)
    assert gradient[:, 6].abs().max() < 1e-12 * gradient.abs().max()
    assert not torch.equal(found[:, 6], W[:, 6])


def test_more_bits_and_smaller_groups_cost_less(generator):
    W = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    A, B = spd(32, generator), spd(16, generator)
    curvature = layer_curvature("W", Kronecker(B, A), 0.01)

    def cost(**options):  # type: ignore[no-untyped-def]
        return curvature.increase(W - round_matrix(W, Grid(**options).levels(W), curvature))

    by_bits = [cost(bits=bits) for bits in (2, 3, 4, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert cost(bits=3, group=8, fit="range") < cost(bits=3, group="tensor", fit="range")


def test_the_grid_holds_what_it_says(generator):
    W = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    W[1] = 0
    for symmetric in (True, False):
        levels = Grid(4, symmetric, "row", "range").levels(W)
        near = levels.nearest(W)
        assert (near - W).abs().max() <= levels.scale.max() / 2 * (1 + 1e-12)
        assert torch.equal(near[1], W[1])
        assert len(near[0].unique()) <= 16
        codes = levels.codes(W)
        assert codes.min() >= 0 and codes.max() <= 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is"),
        ({"bits": 4.5}, "bits is"),
        ({"bits": True}, "bits is"),
        ({"group": 0}, "group is"),
        ({"group": "column"}, "group is"),
        ({"fit": "least"}, "fit is"),
    ],
)
def test_a_grid_refuses_options_that_mean_nothing(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Grid(**options)
