"""Damping is what it says: exact, or factored by the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import (
    BlockDiagonal,
    Cholesky,
    Dense,
    Diagonal,
    FactoredTikhonov,
    Kronecker,
    LinearOperator,
    RelativeTikhonov,
    Segment,
    Shifted,
    Tikhonov,
    power,
)
from solvers.operators.damping import Damping
from solvers.operators.stacked import stacked, unstacked
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


def stack_members(form: str, k: int = 3) -> list[LinearOperator]:
    generator = torch.Generator().manual_seed(0)
    scales = [10.0 ** (3 * i) for i in range(k)]  # of different sizes, so that floors differ
    match form:
        case "kronecker":
            return [Kronecker(Dense(s * positive(4), is_gram=True), Dense(positive(3), is_gram=True)) for s in scales]
        case "half diagonal":
            return [Kronecker(positive(4), Diagonal(s + torch.arange(3, dtype=torch.float64))) for s in scales]
        case "matrices":
            return [Dense(s * torch.stack([positive(2), 2 * positive(2)])) for s in scales]
    return [Diagonal(s * torch.rand(2, 5, generator=generator, dtype=torch.float64)) for s in scales]


@pytest.mark.parametrize("form", ["kronecker", "half diagonal", "matrices", "diagonal"])
@pytest.mark.parametrize("floor", [0.0, 1e-2])
@pytest.mark.parametrize("kind", [Tikhonov, FactoredTikhonov])
@pytest.mark.parametrize("lam", [0.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_a_stack_is_damped_as_each_of_its_operators(form: str, floor: float, kind: type, lam: Any) -> None:
    members = stack_members(form)
    damping = kind(lam)
    assert damping.serves_stack(members[0]) == (kind is FactoredTikhonov or form in ("matrices", "diagonal"))
    if not damping.serves_stack(members[0]):
        return
    damped = unstacked(damping.in_stack(stacked(members), floor))
    for one, alone in zip(damped, members, strict=True):
        strength = max(float(lam), floor * float(alone.trace()) / alone.shape[1])
        expected = kind(strength)(alone).to_dense()
        torch.testing.assert_close(one.to_dense(), expected, rtol=1e-14, atol=1e-14)


def test_what_is_in_units_of_each_operator_or_of_ones_own_serves_no_stack() -> None:
    class Mine(Tikhonov):
        def __call__(self, op: LinearOperator) -> LinearOperator:
            return op.shift(2 * self.lam)

    op = Dense(positive(3))
    assert not RelativeTikhonov(0.1).serves_stack(op) and not Mine(0.1).serves_stack(op)
    with pytest.raises(TypeError, match="damps no operators in a stack"):
        RelativeTikhonov(0.1).in_stack(op)


@pytest.mark.parametrize("n", [4, 700])
def test_a_shift_that_is_left_to_the_solver_is_the_same_damping(n: int) -> None:
    rows = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op = Kronecker(Dense(rows @ rows.mT / n, is_gram=True), Dense(positive(3), is_gram=True))
    for damping in (FactoredTikhonov(0.1), Tikhonov(0.1), FactoredTikhonov(0.0)):
        left = damping.deferred(op)
        x = torch.ones(n, 3, dtype=torch.float64)
        torch.testing.assert_close(left @ x, damping(op) @ x, rtol=1e-13, atol=1e-13)
    found, expected = (power(d(op), -1, Cholesky()) for d in (FactoredTikhonov(0.1).deferred, FactoredTikhonov(0.1)))
    assert isinstance(found, Kronecker) and isinstance(expected, Kronecker)
    for one, other in zip(found.factors, expected.factors, strict=True):
        torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-11, atol=1e-13)
