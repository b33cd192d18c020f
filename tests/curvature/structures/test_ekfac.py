"""Is EKFAC's spectrum the diagonal of the matrix in its basis, and is EKFAC closer to it than K-FAC?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvature.layers.block import BlockPlace
from solvers import Eigen, Kronecker
from tests.curvature import dense_reference as dense
from tests.curvature.estimates import estimate
from tests.curvature.problems import PROBLEMS, Problem


def sub_block(full: Tensor, place: Any) -> Tensor:
    index = place.gather(torch.arange(len(full))).flatten()
    return full[index[:, None], index]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "exact") for name in PROBLEMS] + [(name, "empirical") for name in ("mlp_ce", "cnn", "language_model")],
)
def test_spectrum_is_the_diagonal_in_the_basis(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    full = dense.curvature(problem, kind)
    ekfac, kfac = (estimate(problem, structure, kind) for structure in ("ekfac", "kfac"))
    torch.testing.assert_close(ekfac.trace(), full.trace(), rtol=1e-10, atol=0)
    assert any(isinstance(block, Eigen) for block in ekfac.blocks)
    for block, other, place in zip(ekfac.blocks, kfac.blocks, ekfac.places, strict=True):
        exact = sub_block(full, place)
        if not isinstance(block, Eigen):  # scale and shift, bare parameters: the same structure as in K-FAC
            torch.testing.assert_close(block.to_dense(), other.to_dense(), rtol=1e-12, atol=1e-14)
            continue
        Q = block.basis.to_dense()
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype), rtol=0, atol=1e-10)
        torch.testing.assert_close(block.values.flatten(), (Q.T @ exact @ Q).diagonal(), rtol=1e-9, atol=1e-12)
        assert isinstance(other, Kronecker)
        error, kfac_error = (torch.dist(m.to_dense(), exact) for m in (block, other))
        assert error <= kfac_error * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("options", [{"bias": "separate"}, {"sharing": "reduce"}, {"max_dim": 4}], ids=str)
@pytest.mark.parametrize("name", ["mlp_ce", "linear_on_sequences", "cnn", "language_model"])
def test_options_choose_the_basis_and_leave_the_trace(name: str, options: dict[str, Any]) -> None:
    problem = PROBLEMS[name]()
    full = dense.ggn(problem)
    got = estimate(problem, "ekfac", "exact", **options)
    torch.testing.assert_close(got.trace(), full.trace(), rtol=1e-10, atol=0)
    for block, place in zip(got.blocks, got.places, strict=True):
        if isinstance(block, Eigen):
            Q = block.basis.to_dense()
            assert isinstance(place, BlockPlace)
            expected = (Q.T @ sub_block(full, place) @ Q).diagonal()
            torch.testing.assert_close(block.values.flatten(), expected, rtol=1e-9, atol=1e-12)


def test_one_example_is_exact() -> None:
    """One input and several columns: the basis diagonalises the block, so nothing is lost."""
    problem = PROBLEMS["mlp_ce"]()
    x, y = problem.data[0]
    one = Problem(problem.model, problem.loss_fn, [(x[:1], y[:1])])
    full, got = dense.ggn(one), estimate(one, "ekfac", "exact")
    for block, place in zip(got.blocks, got.places, strict=True):
        torch.testing.assert_close(block.to_dense(), sub_block(full, place), rtol=1e-9, atol=1e-12)
