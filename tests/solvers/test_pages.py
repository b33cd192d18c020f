"""Memory in huge pages is memory."""

import pytest
import torch

from solvers import pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 1 << 22), (1, (1 << 22) + 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_written_and_read_as_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = pages.fresh(*shape, dtype=dtype, device=CPU)
    assert (x.shape, x.dtype, x.is_contiguous()) == (shape, dtype, True)
    x.fill_(1.5)
    assert torch.equal(x, torch.full(shape, 1.5, dtype=dtype))
    x.resize_(2 * x.numel())  # as tensors of torch's own can be


def test_where_nobody_gives_huge_pages_it_is_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert pages.fresh(1 << 23, dtype=torch.float32, device=CPU).fill_(2).sum() == 1 << 24


def test_large_ones_are_asked_for_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda start, size, _: asked.append((start, size)))
    pages.fresh(100, dtype=torch.float32, device=CPU)
    assert not asked
    x = pages.fresh(1 << 23, dtype=torch.float32, device=CPU)
    ((start, size),) = asked
    assert x.data_ptr() <= start and start + size <= x.data_ptr() + x.nbytes and size > 0.9 * x.nbytes


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((1, 7, 1100, 1), (7, 1, 1200)), ((2, 1, 900, 3), (5, 3, 1000))])
def test_products_are_those_of_torch(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    left, right = (torch.randn(shape) for shape in shapes)
    assert torch.equal(pages.product(left, right), left @ right)
    strided = left.mT.contiguous().mT
    assert torch.equal(pages.product(strided, right), strided @ right)
    assert pages.product(left.requires_grad_(), right).requires_grad
