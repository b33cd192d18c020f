"""Randomised Nystrom approximation, as a preconditioner and as an approximate solver.

Axis letters: l columns of the sketch, n entries of ``in_shape``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.iterative.base import Iterate, IterativeInverse, IterativeSolver, LinearSystem
from solvers.operators.compositions import Shifted
from solvers.operators.congruence import Congruence
from solvers.operators.decompositions import power_of_two, singular_value_decomposition
from solvers.operators.dense import symmetric_part
from solvers.operators.diagonal import Diagonal
from solvers.operators.linear_operator import LinearOperator
from solvers.operators.low_rank import LowRank, Rows
from solvers.outcome.arguments import instance, whole
from solvers.outcome.errors import NonFiniteError, NotPositiveDefiniteError, StructureError
from solvers.outcome.finite import is_finite
from solvers.outcome.solution import OnFailure


@dataclass(frozen=True, eq=False)
class NystromSketch:
    """Eigenpairs ``U diag(s) U^T`` of a sketch of A, from which a preconditioner for every shift follows.

    Attributes:
        basis: Orthonormal rows ``(l, n)``.
        values: Eigenvalues ``(l,)``, descending.
        op: A.
    """

    basis: Tensor
    values: Tensor
    op: LinearOperator

    def precondition(self, lam: float | Tensor) -> LinearOperator:
        """Positive definite operator near a multiple of ``(A + lam I)^-1``."""
        return _inverse(self.basis, self.values, lam, self.values[-1] + lam, self.op)


@dataclass(frozen=True)
class Nystrom(IterativeSolver):
    r"""Approximates ``A + lam I`` by ``U diag(s) U^T + lam I`` from ``rank`` products with the semi-definite A.

    As a preconditioner, :meth:`precondition`, it leaves CG with a condition near
    :math:`(\lambda_l(A) + \lambda) / \lambda`: the choice when the spectrum falls fast and A is known by its products.
    As a solver it is right where the rank covers the spectrum down to lam; the true residual is checked each time.

    Args:
        rank: Columns of the sketch l; memory ``l n``.
        rtol: The residual that a solve has to reach, ``|b - A x| <= max(rtol |b|, atol)``.
        atol: See ``rtol``; in units of b.
        generator: Where the sketch is drawn from; None draws the same one each time.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: Unused: all products are one batch.

    Raises:
        StructureError: If the operator is not a :class:`~solvers.Shifted`.

    References:
        Frangella, Tropp and Udell (2023), algorithms 2.1 and 5.1, https://arxiv.org/abs/2110.02820
    """

    rank: int
    rtol: float = 1e-5
    atol: float = 0.0
    generator: torch.Generator | None = None
    on_failure: OnFailure = "warn"
    progress: bool | None = None

    exponents: ClassVar[tuple[float, ...] | None] = (-1,)
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Shifted,)

    def __post_init__(self) -> None:
        """Validate the arguments."""
        whole("rank", self.rank)
        super().__post_init__()
        instance("generator", self.generator, torch.Generator, "a torch.Generator", optional=True)

    @property
    def max_steps(self) -> int | None:
        """The number of products, all in one batch."""
        return self.rank

    @property
    def preconditioner(self) -> LinearOperator | None:
        """None: it is a preconditioner itself."""
        return None

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> IterativeInverse:
        """The approximate inverse; each product sketches again and checks its residual. See :meth:`precondition`."""
        _split(op)
        return super().power(op, exponent, previous)

    def approximate(self, op: LinearOperator) -> LowRank:
        """A rank-l approximation of a positive semi-definite operator, below it in the order of such operators.

        Raises:
            NotPositiveDefiniteError: If the sketch shows that the operator is not semi-definite.
            NonFiniteError: If a product holds NaN or infinity.
        """
        basis, values = self._sketch(op)
        root = values.sqrt().unsqueeze(-1) * basis
        return LowRank(root.reshape(-1, *op.in_shape), gram=values.diag())

    def precondition(self, op: LinearOperator) -> LinearOperator:
        """Positive definite operator near a multiple of ``op^-1``, for CG and MINRES; sketched once, here."""
        inner, lam = _split(op)
        return self.sketch(inner).precondition(lam)

    def sketch(self, op: LinearOperator) -> NystromSketch:
        """The ``rank`` products with an operator that hasn't got its shift yet, to serve several of them.

        Raises:
            NotPositiveDefiniteError: If the sketch shows that the operator is not semi-definite.
            NonFiniteError: If a product holds NaN or infinity.
        """
        return NystromSketch(*self._sketch(op), op)

    def iterate(self, system: LinearSystem) -> Iterate:
        """Solve with the approximation in one step."""
        inner, lam = _split(system.op)
        basis, values = self._sketch(inner)
        inverse = _inverse(basis, values, lam, torch.as_tensor(lam, dtype=values.dtype, device=values.device), inner)
        r = system.b - system.product(system.x)
        change = (inverse @ r.reshape(-1, *inner.in_shape)).reshape(r.shape) * system.size
        return Iterate(system.x + change, values.shape[0])

    def _sketch(self, op: LinearOperator) -> tuple[Tensor, Tensor]:
        """Orthonormal rows ``(l, n)`` and eigenvalues ``(l,)``, descending."""
        n = op.shape[1]
        generator = torch.Generator(op.device).manual_seed(0) if self.generator is None else self.generator
        size = (n, min(self.rank, n))
        gaussian = torch.randn(size, generator=generator, dtype=op.dtype, device=generator.device).to(op.device)
        omega = torch.linalg.qr(gaussian).Q  # (n, l)
        y = (op @ omega.mT.reshape(-1, *op.in_shape)).reshape(-1, n).mT
        if not is_finite(y):
            raise NonFiniteError(f"Nystrom met NaN or infinity in the products of {op!r}.")
        unit = power_of_two(y)  # squares of norms leave the floating range before the entries do
        y = y / unit
        norm = torch.linalg.vector_norm(y)
        if not bool(norm > 0):
            return omega.mT, torch.zeros_like(omega[0])
        nu = torch.finfo(op.dtype).eps * norm  # a shift that keeps the core positive definite, taken back below
        y = y + nu * omega
        core = omega.mT @ y
        factor, info = torch.linalg.cholesky_ex(symmetric_part(core))
        if bool(info):
            raise NotPositiveDefiniteError(
                f"Nystrom needs a positive semi-definite operator, and {op!r} + {float(nu * unit):.1g} I is not. Use "
                "MINRES() for an indefinite one."
            )
        b = torch.linalg.solve_triangular(factor, y.mT, upper=False)  # (l, n)
        _, singular, basis = singular_value_decomposition(b)
        return basis, (singular.square() - nu).clamp(min=0) * unit.squeeze()


def _split(op: LinearOperator) -> tuple[LinearOperator, float | Tensor]:
    if not isinstance(op, Shifted):
        raise StructureError(
            f"Nystrom needs the shift apart from the rest, A.shift(lam), not {op!r}. Structures that absorb a shift "
            "have direct inverses."
        )
    return op.op, op.lam


def _inverse(basis: Tensor, values: Tensor, lam: float | Tensor, rest: Tensor, op: LinearOperator) -> LinearOperator:
    """``U diag(1 / (s + lam)) U^T + (I - U U^T) / rest``."""
    rows = Rows(basis.reshape(-1, *op.in_shape))
    return Congruence(rows, Diagonal(1 / (values + lam) - 1 / rest)).shift(1 / rest)
