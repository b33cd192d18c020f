"""Powers of low rank plus shift through the Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.direct.cholesky import CholeskyInverse, cholesky_factor
from solvers.direct.eigh import Eigh
from solvers.operators.compositions import Shifted, Sum
from solvers.operators.congruence import Congruence
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal
from solvers.operators.eigen import Eigen
from solvers.operators.linear_operator import LinearOperator
from solvers.operators.low_rank import LowRank, Rows
from solvers.outcome.checks import require
from solvers.outcome.errors import SingularMatrixError, StructureError
from solvers.solver import Solver


@dataclass(frozen=True)
class Woodbury(Solver):
    r"""Any real power of ``U^T U + lam I``, and the inverse of ``U^T U + D``, in the size k of the Gram matrix.

    .. math:: (\lambda I + U^\top U)^{-1} = \tfrac1\lambda \left(I - U^\top (\lambda I + U U^\top)^{-1} U\right)

    and for other exponents, with :math:`U U^\top = W \operatorname{diag}(s) W^\top`,
    :math:`\lambda^p I + U^\top W \operatorname{diag}\frac{(s + \lambda)^p - \lambda^p}{s} W^\top U`.
    Costs ``O(k^2 n + k^3)`` once and ``O(k n)`` per product: the choice when k (samples) is below n (parameters).
    Rounding errors are about ``eps |C| / lam`` relative to the result.

    References:
        Woodbury (1950); natural gradients: Ren and Goldfarb (2019), https://arxiv.org/abs/1906.02353
    """

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Shifted, Sum)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent`` of ``LowRank + lam I``, or the inverse of ``LowRank + Diagonal``.

        Raises:
            StructureError: For another structure.
            SingularMatrixError: If the shift is not positive.
            NonFiniteError: If the Gram matrix holds NaN or infinity.
        """
        match op:
            case Shifted(op=LowRank() as low_rank, lam=lam):
                shift = torch.as_tensor(lam, dtype=op.dtype, device=op.device)
                _require_positive(shift, op)
                if exponent == -1:
                    return _inverse(low_rank, shift)
                return _power(low_rank, shift, exponent)
            case Sum(terms=(LowRank() as low_rank, Diagonal() as diagonal)) if exponent == -1:
                return self._of_sum(low_rank, diagonal, op)
            case Sum(terms=(Diagonal() as diagonal, LowRank() as low_rank)) if exponent == -1:
                return self._of_sum(low_rank, diagonal, op)
        raise StructureError(
            f"Woodbury serves LowRank + lam I, and the inverse of LowRank + Diagonal, not {op!r} ** {exponent:g}. "
            "Use CG(), which needs products only."
        )

    def _of_sum(self, low_rank: LowRank, diagonal: Diagonal, op: LinearOperator) -> LinearOperator:
        # (D + U^T U)^-1 = D^-1 - V^T (I + V U^T)^-1 V with V = U D^-1
        _require_positive(diagonal.values, op)
        inverse = Diagonal(1 / diagonal.values)
        root = low_rank.root
        scaled = Rows(root / diagonal.values) if isinstance(root, Tensor) else root @ inverse
        core = Dense((scaled @ low_rank.factor.adjoint()).to_dense()).add_diagonal(1.0)
        return inverse - Congruence(scaled, CholeskyInverse(cholesky_factor(core)))


def _inverse(low_rank: LowRank, shift: Tensor) -> LinearOperator:
    gram = CholeskyInverse(cholesky_factor(Dense(low_rank.gram_matrix()).add_diagonal(shift)))
    return Shifted(Congruence(low_rank.factor, (-1 / shift) * gram), 1 / shift)


def _power(low_rank: LowRank, shift: Tensor, exponent: float) -> LinearOperator:
    values, basis = Eigh().basis(low_rank.gram_matrix())
    values = values.clamp(min=0)  # of a Gram matrix: below zero by rounding only
    # ((s + lam)^p - lam^p) / s without cancellation, and its limit p lam^(p-1) where s vanishes beside lam
    tiny = values <= torch.finfo(values.dtype).eps * shift
    ratio = torch.where(tiny, 1, values / shift)
    slope = torch.where(tiny, exponent, torch.expm1(exponent * torch.log1p(ratio)) / ratio)
    middle = Eigen(Dense(basis), slope * shift ** (exponent - 1))
    return Shifted(Congruence(low_rank.factor, middle), shift**exponent)


def _require_positive(shift: Tensor, op: LinearOperator) -> None:
    require(
        (shift > 0).all(),
        lambda: SingularMatrixError(f"{op!r} has no inverse by Woodbury: the shift must be positive. Add damping."),
    )
