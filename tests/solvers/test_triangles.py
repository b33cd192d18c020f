"""Products of which one triangle is computed, in parts, beside whole products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from solvers.triangles import add_gram, add_symmetric, gram, upper_times


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# (m, d): one number, one part, the largest part and beyond it by either size, two levels of halves; no row at all.
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (257, 256), (257, 257), (257, 129), (300, 530), (3, 300), (0, 3)])
@pytest.mark.parametrize("stack", [(), (2,), (2, 1)])
def test_gram_matrices_are_whole(stack: tuple[int, ...], shape: tuple[int, int]) -> None:
    rows = normal(*stack, *shape)
    product = torch.einsum("...mi,...mj->...ij", rows, rows)
    torch.testing.assert_close(gram(rows), product, rtol=1e-12, atol=1e-12)
    columns = rows.mT.contiguous().mT
    torch.testing.assert_close(gram(columns), product, rtol=1e-12, atol=1e-12)
    before = gram(normal(*stack, 2, shape[-1], seed=1))
    out = before.clone()
    assert add_gram(out, rows, old=0.25, new=3) is out
    torch.testing.assert_close(out, before / 4 + 3 * product, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stack", [(), (2,), (2, 1)])
def test_a_symmetric_product_of_two_matrices_is_taken_by_one_triangle(stack: tuple[int, ...]) -> None:
    x, a = normal(*stack, 300, 530), gram(normal(*stack, 300, 300, seed=1))
    before = gram(normal(*stack, 2, 530, seed=2))
    out, y = before.clone(), a @ x
    with FlopCounterMode(display=False) as counter:
        assert add_symmetric(out, x, y, old=0.25, new=3) is out
    torch.testing.assert_close(out, before / 4 + 3 * x.mT @ y, rtol=1e-12, atol=1e-8)
    assert torch.equal(out[..., 300:, :200], out[..., :200, 300:].mT)
    assert counter.get_total_flops() < 0.76 * 2 * 300 * 530**2 * x[..., 0, 0].numel()


def test_a_gram_matrix_goes_into_a_part_of_another_one_whatever_stood_there() -> None:
    rows = normal(2, 300, 300)
    whole = torch.full((2, 301, 301), torch.nan, dtype=torch.float64)
    add_gram(whole[..., :300, :300], rows, old=0, new=1)
    torch.testing.assert_close(whole[..., :300, :300], rows.mT @ rows, rtol=1e-12, atol=1e-12)
    assert whole[:, 300].isnan().all() and whole[..., 300].isnan().all()


@pytest.mark.parametrize(("stack", "n", "m"), [((), 1, 3), ((), 7, 0), ((2,), 256, 2), ((), 257, 1), ((2,), 530, 3)])
def test_an_upper_triangle_times_a_matrix(stack: tuple[int, ...], n: int, m: int) -> None:
    upper, x = normal(*stack, n, n).triu(), normal(*stack, n, m, seed=1)
    torch.testing.assert_close(upper_times(upper, x), upper @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "share"), [((256, 512), 1), ((1024, 512), 5 / 8), ((5000, 512), 3 / 4)])
def test_a_gram_matrix_costs_as_much_of_a_product_as_its_parts(shape: tuple[int, int], share: float) -> None:
    m, d = shape
    with FlopCounterMode(display=False) as counter:
        gram(torch.zeros(shape))
    assert counter.get_total_flops() == share * 2 * m * d * d
