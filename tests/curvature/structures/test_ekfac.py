"""The spectrum of EKFAC from its definition, whichever way round it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart
from curvature.layers.samples import Outer, Samples
from curvature.structures.ekfac import EigenbasisEstimator, _turns_gradients
from solvers import Diagonal, Kronecker


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("positions", [(1,), (2,), (40,), (40, 3)])
def test_squares_of_the_gradients_in_the_basis(positions: tuple[int, ...], flipped: bool, merge: bool) -> None:
    torch.manual_seed(0)
    k, n, d_out, d_in = 2, 5, 3, 4
    shape = (d_in, d_out) if flipped else (d_out, d_in)
    uses = tuple(
        Outer(
            torch.randn(n, s, d_in - (not flipped), dtype=torch.float64),
            torch.randn(k, n, s, d_out, dtype=torch.float64),
            flipped=flipped,
            ones=not flipped,
            source=i,
        )
        for i, s in enumerate(positions)
    )
    samples = Samples(uses, weight=3.0, merge=merge)
    estimator = EigenbasisEstimator(Block("layer", (BlockPart("weight", 0, shape, (0, 1), shape),)))
    left, right = map(orthogonal, shape)
    estimator.basis = Kronecker(left, right)
    estimator.project(samples)
    each = torch.zeros(k, n, *shape, dtype=torch.float64)
    for use in uses:
        outer = torch.einsum("knso,nsi->knoi", use.g, use.rows)
        each += outer.mT if flipped else outer
    each = each.sum(1, keepdim=True) if merge else each
    expected = torch.einsum("knoi,oa,ib->knab", each, left, right).square().sum((0, 1)) / 3
    torch.testing.assert_close(estimator.spectrum.step_mean(), expected, rtol=1e-12, atol=1e-12)
    assert _turns_gradients(samples) == (merge or max(positions) > 2)


@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize("whole", [(True, True), (True, False), (False, True)])
def test_low_precision_is_left_before_anything_is_summed(whole: tuple[bool, bool], positions: int) -> None:
    """Sums over positions overflow in float16; a side that is a diagonal (a head of many words) is not turned."""
    torch.manual_seed(0)
    a, g = 200 * torch.rand(5, positions, 4).half(), 200 * torch.rand(2, 5, positions, 3).half()
    sizes = zip((3, 4), whole, strict=True)
    factors = [torch.linalg.qr(torch.randn(n, n))[0] if w else Diagonal(torch.ones(n)) for n, w in sizes]
    spectra = []
    for dtype in (torch.float16, torch.float32):
        estimator = EigenbasisEstimator(Block("layer", (BlockPart("weight", 0, (3, 4), (0, 1), (3, 4)),)))
        estimator.basis = Kronecker(*factors)
        estimator.project(Samples((Outer(a.to(dtype), g.to(dtype)),), weight=3.0))
        spectra.append(estimator.spectrum.step_mean())
    assert (g.mT.float() @ a.float()).amax() > (0 if positions == 1 else 65504) and torch.equal(*spectra)
