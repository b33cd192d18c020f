"""Does an operator from outside the library join every function by rules of its own?"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

import solvers
from solvers import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigen,
    Eigh,
    FactoredTikhonov,
    Flattened,
    Function,
    Kronecker,
    LinearOperator,
    RelativeTikhonov,
    Segment,
    StructureError,
    diagonalize,
    from_state,
    power,
    rule,
    solve,
    state,
)
from solvers.operators.damping import factored_tikhonov, relative_tikhonov
from solvers.rules import PowerTask, shifted_power
from tests.solvers.circulant import PlainCirculant, SymmetricCirculant
from tests.solvers.contracts import OperatorContract
from tests.solvers.problems import normal, positive

COLUMN = torch.tensor([5.0, 1.0, 0.5, 0.5, 1.0], dtype=torch.float64)
EVEN = torch.tensor([5.0, 1.0, 0.5, 1.0], dtype=torch.float64)
EYE = torch.eye(30, dtype=torch.float64)


def matrix(column: Tensor = COLUMN) -> Tensor:
    """By its definition: each column is the one before, moved by one."""
    return torch.stack([column.roll(shift) for shift in range(len(column))], 1)


def matrix_power(symmetric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors @ torch.diag(values**exponent) @ vectors.mT


class TestCirculant(OperatorContract):
    exact = ("diagonal", "trace", "logdet")

    def operator(self) -> LinearOperator:
        return SymmetricCirculant(COLUMN)

    def matrix(self) -> Tensor:
        return matrix()


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.25, 2.0])
def test_power_keeps_the_class(exponent: float) -> None:
    result = power(SymmetricCirculant(COLUMN), exponent)
    assert isinstance(result, SymmetricCirculant)
    torch.testing.assert_close(result.to_dense(), matrix_power(matrix(), exponent))


def test_inverse_with_damping_and_solve() -> None:
    op, b = SymmetricCirculant(COLUMN), normal(3, 5)
    damped = matrix() + 0.3 * EYE[:5, :5]
    for damping in (0.3, FactoredTikhonov(0.3), RelativeTikhonov(0.3 / 5)):
        inverse = op.inverse(damping)
        assert isinstance(inverse, SymmetricCirculant)
        torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(damped))
    torch.testing.assert_close(solve(op, b), torch.linalg.solve(matrix(), b.mT).mT)
    torch.testing.assert_close(solvers.Shifted(op, 0.3).logdet(), torch.logdet(damped))


def test_the_spectrum_goes_through_the_solver() -> None:
    singular = SymmetricCirculant(torch.tensor([1.0, 1.0], dtype=torch.float64))
    with pytest.raises(solvers.SingularMatrixError, match="singular"):
        singular.inverse()
    torch.testing.assert_close(power(singular, 0.5, Eigh()).to_dense(), matrix_power(singular.to_dense(), 1.0) / 2**0.5)


def test_diagonalize() -> None:
    eigen = diagonalize(SymmetricCirculant(COLUMN))
    assert isinstance(eigen, Eigen)
    torch.testing.assert_close(eigen.to_dense(), matrix())
    torch.testing.assert_close(eigen.basis.to_dense() @ eigen.basis.to_dense().mT, EYE[:5, :5])


def test_it_is_a_part_of_structures() -> None:
    blocks = BlockDiagonal(
        (SymmetricCirculant(COLUMN), Flattened(SymmetricCirculant(EVEN), (2, 2))),
        (Segment(0, (5,)), Segment(5, (2, 2))),
        9,
    )
    inverse = blocks.inverse(0.1)
    assert isinstance(inverse, BlockDiagonal) and isinstance(inverse.blocks[0], SymmetricCirculant)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(blocks.to_dense() + 0.1 * EYE[:9, :9]))
    product = Kronecker(Dense(positive(3)), SymmetricCirculant(COLUMN))
    dense = torch.kron(positive(3), matrix())
    torch.testing.assert_close(power(product, -0.5).to_dense(), matrix_power(dense, -0.5))
    damped = product.inverse(0.2, Eigh())  # through the bases of both factors
    assert isinstance(damped, Eigen)
    torch.testing.assert_close(damped.to_dense(), torch.linalg.inv(dense + 0.2 * EYE[:15, :15]))


def test_state_comes_back() -> None:
    file = io.BytesIO()
    torch.save(state(Kronecker(SymmetricCirculant(COLUMN), Diagonal(COLUMN))), file)
    file.seek(0)
    back = from_state(torch.load(file, weights_only=True))
    assert isinstance(back, Kronecker) and isinstance(back.factors[0], SymmetricCirculant)
    assert torch.equal(back.factors[0].column, COLUMN)


def test_without_a_rule_the_refusal_names_the_one_to_write() -> None:
    op = PlainCirculant(COLUMN)
    with pytest.raises(StructureError, match=r"needs Dense.* @solvers\.rule\(solvers\.power, PlainCirculant\)"):
        op.inverse()
    with pytest.raises(StructureError, match=r"no eigenbasis.* @solvers\.rule\(solvers\.diagonalize, PlainCirculant\)"):
        diagonalize(op)
    torch.testing.assert_close(op.inverse(0.1, dense=True).to_dense(), torch.linalg.inv(matrix() + 0.1 * EYE[:5, :5]))
    with pytest.raises(StructureError) as refused:  # there is no rule to write for a class of the library
        Function(lambda x: x, (3,), symmetric=True, dtype=torch.float64).inverse()
    assert "rule" not in str(refused.value)


def test_rules_for_dampings_and_for_symbolic_shifts() -> None:
    class Named(PlainCirculant):
        pass

    @rule(factored_tikhonov, Named)
    def factored(op: Named, lam: float) -> LinearOperator:
        return SymmetricCirculant(op.column).shift(2 * lam)

    @rule(relative_tikhonov, Named)
    def relative(op: Named, fraction: float) -> LinearOperator:
        return SymmetricCirculant(op.column).shift(3 * fraction)

    @rule(shifted_power, Named)
    def shifted(inner: Named, op: solvers.Shifted, task: PowerTask) -> LinearOperator:
        return task.of(SymmetricCirculant(inner.column).shift(op.lam))

    op = Named(COLUMN)
    for damped, lam in ((FactoredTikhonov(0.1)(op), 0.2), (RelativeTikhonov(0.1)(op), 0.3)):
        torch.testing.assert_close(damped.to_dense(), matrix() + lam * EYE[:5, :5])
    blocks = BlockDiagonal((op, op), (Segment(0, (5,)), Segment(5, (5,))), 10)
    assert all(isinstance(block, SymmetricCirculant) for block in FactoredTikhonov(0.1)(blocks).blocks)  # type: ignore[attr-defined]
    assert isinstance(op.shift(0.1), solvers.Shifted)
    torch.testing.assert_close(op.inverse(0.1).to_dense(), torch.linalg.inv(matrix() + 0.1 * EYE[:5, :5]))


def test_a_subclass_takes_the_rule_of_its_base_until_it_has_one() -> None:
    class Special(SymmetricCirculant):
        pass

    assert power(Special(COLUMN), 2.0).to_dense().allclose(matrix() @ matrix())

    @rule(power, Special)
    def special(op: Special, task: PowerTask) -> LinearOperator:
        return task.leaf(op) if task.exponent == 2 else op

    result = Special(COLUMN)
    assert power(result, -1) is result
    with pytest.raises(StructureError, match="needs Dense"):
        power(result, 2.0)


def test_what_takes_no_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no rules; .*power.* do"):
        rule(solve, SymmetricCirculant)
    with pytest.raises(TypeError, match="kind of LinearOperator"):
        rule(power, int)  # type: ignore[arg-type]
    for kind in (Kronecker, SymmetricCirculant):
        with pytest.raises(ValueError, match=f"power has a rule for {kind.__name__}; derive a class"):
            rule(power, kind)
    with pytest.raises(TypeError, match=r"solver is a solvers\.Solver such as Cholesky\(\), not 'eigh'"):
        SymmetricCirculant(COLUMN).inverse(solver="eigh")  # type: ignore[arg-type]
