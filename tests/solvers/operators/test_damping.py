"""Damping is what it says: exact, or factored by the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from solvers import (
    BlockDiagonal,
    Dense,
    Diagonal,
    FactoredTikhonov,
    Kronecker,
    LinearOperator,
    RelativeTikhonov,
    Segment,
    Shifted,
    Tikhonov,
)
from solvers.operators.damping import Damping
from tests.solvers.problems import normal, positive

EYE = torch.eye(12, dtype=torch.float64)


def test_tikhonov_is_a_shift() -> None:
    op = Kronecker(positive(4), positive(3))
    damped = Tikhonov(0.3)(op)
    assert isinstance(damped, Shifted) and damped.op is op
    assert Tikhonov(0.0)(op) is op and FactoredTikhonov(0)(op) is op
    torch.testing.assert_close(Tikhonov(0.3)(Dense(positive(4))).to_dense(), positive(4) + 0.3 * EYE[:4, :4])


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_factored_tikhonov_is_the_published_formula(lam: float | Tensor) -> None:
    b, a = positive(4), 100 * positive(3)
    damped = FactoredTikhonov(lam)(Kronecker(b, a))
    pi = float(((a.trace() / 3) / (b.trace() / 4)) ** 0.5)
    assert isinstance(damped, Kronecker)
    torch.testing.assert_close(damped.factors[0].to_dense(), b + 0.3**0.5 / pi * EYE[:4, :4])
    torch.testing.assert_close(damped.factors[1].to_dense(), a + 0.3**0.5 * pi * EYE[:3, :3])


def test_factored_tikhonov_does_not_depend_on_how_the_scale_is_shared() -> None:
    first = FactoredTikhonov(0.3)(Kronecker(positive(4), positive(3)))
    second = FactoredTikhonov(0.3)(Kronecker(positive(4) * 1e6, positive(3) / 1e6))
    torch.testing.assert_close(first.to_dense(), second.to_dense())


def test_factored_tikhonov_of_three_factors() -> None:
    matrices = [positive(2), 10 * positive(3), 7 * positive(2, seed=1)]
    damped = FactoredTikhonov(0.3)(Kronecker(matrices[0], Diagonal(matrices[1].diagonal()), matrices[2]))
    assert isinstance(damped, Kronecker)
    means = [float(m.diagonal().mean()) for m in matrices]
    geometric = (means[0] * means[1] * means[2]) ** (1 / 3)
    for factor, matrix, mean in zip(damped.factors, matrices, means, strict=True):
        shift = 0.3 ** (1 / 3) * mean / geometric
        torch.testing.assert_close(factor.diagonal(), matrix.diagonal() + shift)
    assert isinstance(damped.factors[1], Diagonal)


def test_each_group_of_a_stack_has_its_own_ratio() -> None:
    b, a = positive(2, 3), positive(4, 3, seed=1) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    damped = FactoredTikhonov(0.3)(Kronecker(b, a))
    assert isinstance(damped, Kronecker)
    for group in range(3):
        alone = FactoredTikhonov(0.3)(Kronecker(b[group], a[group]))
        assert isinstance(alone, Kronecker)
        for whole, part in zip(damped.factors, alone.factors, strict=True):
            assert isinstance(whole, Dense)
            torch.testing.assert_close(whole.matrix[group], part.to_dense())


@pytest.mark.parametrize("other", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_trace_means_no_ratio(other: float) -> None:
    damped = FactoredTikhonov(0.25)(Kronecker(positive(2), other * EYE[:3, :3].diagonal().diag()))
    assert isinstance(damped, Kronecker)
    torch.testing.assert_close(damped.factors[0].to_dense(), positive(2) + 0.5 * EYE[:2, :2])
    if other == 0:
        torch.testing.assert_close(damped.factors[1].to_dense(), 0.5 * EYE[:3, :3])


def test_without_kronecker_structure_it_is_exact() -> None:
    for op in (Dense(positive(4)), Diagonal(normal(2, 2)), Kronecker(positive(4))):
        expected = op.to_dense() + 0.3 * EYE[:4, :4]
        torch.testing.assert_close(FactoredTikhonov(0.3)(op).to_dense(), expected)


def test_blocks_are_damped_one_by_one() -> None:
    kron = Kronecker(positive(2), 9 * positive(3))
    op = BlockDiagonal([kron, Dense(positive(2))], [Segment(0, (2, 3)), Segment(6, (2,))], 8)
    damped = FactoredTikhonov(0.3)(op)
    assert isinstance(damped, BlockDiagonal)
    torch.testing.assert_close(damped.blocks[0].to_dense(), FactoredTikhonov(0.3)(kron).to_dense())
    torch.testing.assert_close(Tikhonov(0.3)(op).to_dense(), op.to_dense() + 0.3 * EYE[:8, :8])


@pytest.mark.parametrize("kind", [Tikhonov, FactoredTikhonov])
@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf"), torch.tensor(-1.0), torch.ones(2)])
def test_impossible_damping_is_refused(kind: type[Damping], lam: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"damping (must be|is a) finite (and|number or 0-d tensor) at least 0"):
        kind(lam)  # type: ignore[call-arg]


def test_relative_tikhonov_shifts_each_block_by_its_own_mean_eigenvalue() -> None:
    small, large = positive(4), 1e3 * positive(3)
    op = BlockDiagonal((Dense(small), Dense(large)), (Segment(0, (4,)), Segment(4, (3,))), 7)
    damped = RelativeTikhonov(0.1)(op).to_dense()
    means = [float(torch.linalg.eigvalsh(matrix).mean()) for matrix in (small, large)]
    torch.testing.assert_close(damped[:4, :4], small + 0.1 * means[0] * EYE[:4, :4])
    torch.testing.assert_close(damped[4:, 4:], large + 0.1 * means[1] * EYE[:3, :3])
    assert RelativeTikhonov(0)(Dense(small)) is not None and torch.equal(
        RelativeTikhonov(0)(op).to_dense(), op.to_dense()
    )


def test_relative_tikhonov_refuses_what_is_no_fraction() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        RelativeTikhonov(-0.1)


@pytest.mark.parametrize("kind", [Tikhonov, FactoredTikhonov, RelativeTikhonov])
def test_strength_is_the_number_and_can_be_replaced(kind: Callable[[float], Damping]) -> None:
    damping = kind(0.25)
    assert damping.strength == 0.25
    other = damping.with_strength(0.5)
    assert type(other) is type(damping) and other == kind(0.5) and damping.strength == 0.25
    assert damping.relative is (kind is RelativeTikhonov)
    with pytest.raises(ValueError, match="at least 0"):
        damping.with_strength(-1.0)
    op = Dense(positive(4))
    torch.testing.assert_close(other(op).to_dense(), kind(0.5)(op).to_dense())


def test_a_damping_must_say_how_strong_it_is() -> None:
    class Silent(Damping):
        def __call__(self, op: LinearOperator) -> LinearOperator:
            return op

    with pytest.raises(TypeError, match=r"abstract method"):
        Silent()  # type: ignore[abstract]
