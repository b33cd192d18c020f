"""Inverses of positive definite matrices by Cholesky factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.operators.bases import Derived, SelfAdjoint
from solvers.operators.compositions import Shifted
from solvers.operators.decompositions import eigenvalues
from solvers.operators.dense import Dense, non_finite, require_symmetric, symmetric_part
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape
from solvers.operators.storable import storable
from solvers.outcome.arguments import flag, real_tensor
from solvers.outcome.checks import require
from solvers.outcome.errors import NonFiniteError, NotPositiveDefiniteError, SolverError
from solvers.precision import widen
from solvers.solver import Solver
from solvers.triangles import upper_times

# From these sizes on one matrix is factored by blocks, of so many rows: those at which that is faster. The second is
# that of sizes that are multiples of 64, whose columns fall into few places of the cache.
_BY_BLOCKS, _OF_WORDS, _BLOCK = 640, 384, 144


@dataclass(frozen=True)
class Cholesky(Solver):
    """Inverts symmetric positive definite matrices; the cheapest direct solver, ``n^3 / 3`` (``n^3`` if explicit).

    Works on matrices in float32 at least: half-precision input is answered in float32. What fails in float32 is refused
    and not tried in float64, as decompositions are: the factorisation succeeds, whatever the scales of the rows, unless
    the smallest eigenvalue (with a unit diagonal) is of the size of the rounding errors of the entries, and then the
    inverse of the rounded matrix is another one than that of the matrix (Demmel's condition). A matrix that *is* in
    float64 is factored there.

    Args:
        explicit: True forms the inverse, a Dense: one matrix product per application. False keeps the triangular
            factor, a :class:`CholeskyInverse`: cheaper to make and a little more accurate, two triangular solves per
            application.

    References:
        Higham (2002), "Accuracy and Stability of Numerical Algorithms", section 10.1.
    """

    explicit: bool = True

    def __post_init__(self) -> None:
        """Validate the arguments."""
        flag("explicit", self.explicit)

    exponents: ClassVar[tuple[float, ...]] = (-1,)
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """The inverse of a Dense, or of a shifted one; block by block for a stack.

        Raises:
            StructureError: For another structure or exponent.
            NotPositiveDefiniteError: If a pivot is not positive.
            NotSymmetricError: If the matrix is not symmetric.
            NonFiniteError: If it holds NaN or infinity, or the inverse overflows.
        """
        matrix, shift = (op.op, op.lam) if isinstance(op, Shifted) and isinstance(op.op, Dense) else (op, 0.0)
        self.check_serves(matrix, exponent)
        assert isinstance(matrix, Dense)
        factor = CholeskyInverse(cholesky_factor(matrix, shift))
        pivots = factor.factor.diagonal(dim1=-2, dim2=-1)
        require(
            torch.isfinite(pivots**-2).all(),  # the diagonal of the inverse is at least these
            lambda: NonFiniteError(f"{matrix!r} ** -1 overflows {pivots.dtype}. Use float64 or more damping."),
        )
        return factor.to_explicit() if self.explicit else factor


@storable
@dataclass(frozen=True, eq=False, repr=False)
class CholeskyInverse(SelfAdjoint, Derived):
    """``(L L^T)^-1`` by the triangular factor ``L (*stack, n, n)``; acts on ``(*stack, n)``."""

    factor: Tensor

    def __post_init__(self) -> None:
        """Validate the arguments."""
        real_tensor("factor", self.factor)
        if self.factor.ndim < 2 or self.factor.shape[-1] != self.factor.shape[-2]:
            raise ValueError(f"factor is a triangle (*stack, n, n), not {tuple(self.factor.shape)}.")

    @property
    def in_shape(self) -> Shape:
        return tuple(self.factor.shape[:-1])

    @property
    def source(self) -> Tensor:
        return self.factor

    def apply(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.in_shape)]
        rows = x.reshape(prod(batch), *self.in_shape).movedim(0, -2)  # (*stack, batch, n)
        if self.factor.device.type == "cpu":
            # torch.cholesky_solve copies the triangle first, and solves from the left run at 0.6 to 0.9 of the speed
            # (512 to 1,000 columns, 128 rows).
            half = torch.linalg.solve_triangular(self.factor.mT, rows, upper=True, left=False)
            solved = torch.linalg.solve_triangular(self.factor, half, upper=False, left=False)
        else:
            solved = torch.cholesky_solve(rows.mT, self.factor).mT
        return solved.movedim(-2, 0).reshape(x.shape)

    def half(self, x: Tensor) -> Tensor:
        r""":math:`L^\top X` of ``X (*stack, n, m)``: its squares add up to those of X in the inverted matrix."""
        return upper_times(self.factor.mT, x)

    def to_explicit(self) -> Dense:
        """The inverse as a matrix, exactly symmetric."""
        if _has_tangent(self.factor):  # which that of torch's inverse is wrong for
            eye = torch.eye(self.factor.shape[-1], dtype=self.factor.dtype, device=self.factor.device)
            half = torch.linalg.solve_triangular(self.factor, eye.expand_as(self.factor), upper=False)
            return Dense(symmetric_part(half.mT @ half), is_gram=True)
        if self.factor.device.type == "cpu":
            # L lies in rows, so L^T in the columns that LAPACK takes. It computes one triangle and torch copies it:
            # symmetric to the last bit here, made so elsewhere.
            return Dense(torch.cholesky_inverse(self.factor.mT, upper=True), is_gram=True)
        return Dense(symmetric_part(torch.cholesky_inverse(self.factor)), is_gram=True)

    def to_dense(self) -> Tensor:
        return self.to_explicit().to_dense()

    def diagonal(self) -> Tensor:
        return self.to_explicit().diagonal()

    def logdet(self) -> Tensor:
        return -2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum()

    def frobenius_norm(self) -> Tensor:
        return self.to_explicit().frobenius_norm()


def cholesky_factor(op: Dense, shift: Scalar = 0.0) -> Tensor:
    """``L`` with ``L L^T = op + shift I``, lower triangular ``(*stack, n, n)``, in float32 at least; checked."""
    require_symmetric(op)
    matrix = widen(op.matrix)
    by_blocks = _by_blocks(matrix) and not (isinstance(shift, Tensor) and shift.requires_grad)
    if not by_blocks and (isinstance(shift, Tensor) or shift):
        op, shift = Dense(matrix, op.is_gram).add_diagonal(shift), 0.0
        matrix = op.matrix
    factor, info = _triangle_by_blocks(matrix, shift) if by_blocks else _triangle(matrix)
    # NaN and infinity can pass without a bad pivot, but in row i of the triangle they reach the pivot L_ii.
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    require((info == 0).all() & torch.isfinite(pivots).all(), lambda: _failure(op, matrix, shift))
    return factor


def _by_blocks(matrix: Tensor) -> bool:
    """Whether a matrix is factored by :func:`_triangle_by_blocks`."""
    n = matrix.shape[-1]
    if matrix.ndim > 2 or matrix.device.type != "cpu" or n < (_BY_BLOCKS if n % 64 else _OF_WORDS):
        return False
    return not (matrix.requires_grad and torch.is_grad_enabled())


def _triangle(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""``L``, and 0 where it exists; on the processor L lies in rows."""
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, info
    upper, info = torch.linalg.cholesky_ex(matrix, upper=True)
    return upper.mT, info


def _triangle_by_blocks(matrix: Tensor, shift: Scalar) -> tuple[Tensor, Tensor]:
    r"""``L`` of ``matrix + shift I``, in rows, and 0 where it exists.

    Before LAPACK works on the processor, torch writes the triangle column by column, which takes as long as the
    factorisation from some hundred columns on, and several times as long where columns lie a multiple of 64 numbers
    apart: such ones, and large ones, go by blocks of columns, from the columns of L that are known:
    :math:`L_{\ge i,i} L_{ii}^\top = A_{\ge i,i} - L_{\ge i,<i} L_{i,<i}^\top`. The triangular solves are taken from the
    right, which from the left run at half the speed; the shift is added to each block in turn.
    """
    n = matrix.shape[-1]
    lower, infos = matrix.new_empty(n, n), []
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        known = lower[start:, :start]
        columns = torch.addmm(matrix[start:, start:end], known, known[: end - start].mT, alpha=-1)
        columns.diagonal().add_(shift)
        block, info = torch.linalg.cholesky_ex(columns[: end - start])
        lower[start:end, start:end] = block
        lower[start:end, end:] = 0
        below = columns[end - start :]
        lower[end:, start:end] = torch.linalg.solve_triangular(block.mT, below, upper=True, left=False)
        infos.append(info)
    return lower, torch.stack(infos).amax()


def _has_tangent(tensor: Tensor) -> bool:
    """Whether a derivative is taken forwards through a tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _failure(op: Dense, matrix: Tensor, shift: Scalar) -> SolverError:
    if not (torch.isfinite(matrix).all() and isfinite(shift)):
        return non_finite(op)
    smallest = float(eigenvalues(matrix.double()).min()) + float(shift)
    return NotPositiveDefiniteError(
        f"Cholesky cannot invert {op!r}: it is not positive definite in {matrix.dtype}, its smallest eigenvalue is "
        f"{smallest:.3g}. Use more damping, Eigh('clamped') or a matrix that was computed in float64."
    )
