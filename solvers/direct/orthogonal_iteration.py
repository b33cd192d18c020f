"""Eigenbases by one warm-started step of orthogonal iteration, for matrices that change slowly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.direct.eigh import Eigh
from solvers.operators.decompositions import power_of_two
from solvers.operators.dense import Dense, non_finite, require_symmetric
from solvers.operators.eigen import Eigen
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, number, whole
from solvers.outcome.checks import require
from solvers.outcome.solution import OnFailure, not_converged
from solvers.precision import widen
from solvers.solver import BasisSolver


@dataclass(frozen=True)
class Subspace(BasisSolver):
    r"""``Q <- qr(A Q)`` from the previous basis: about ``10/3 n^3`` per step, well below a full decomposition.

    For bases that are refreshed every few steps (SOAP, Shampoo): any orthogonal basis is usable there, and a near one
    moves little. Columns keep the order and the sign of the previous basis, so that moments kept in it stay valid. The
    eigenvalues are ``diag(Q^T A Q)``. Without a previous basis it is :class:`Eigh`.

    Args:
        steps: QR steps.
        tolerance: The previous basis is kept where the off-diagonal part of ``Q^T A Q`` is at most this fraction of its
            norm; 0 always steps, and reads nothing back from the device.
        rtol: For powers: the off-diagonal fraction up to which ``Q f(diag) Q^T`` may stand for ``f(A)``.
        on_failure: Whether powers "warn" or "raise" beyond ``rtol``; never silent.

    References:
        Vyas et al. (2024), algorithm 4, https://arxiv.org/abs/2409.11321
    """

    steps: int = 1
    tolerance: float = 0.0
    rtol: float = 1e-2
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        """Validate the arguments."""
        whole("steps", self.steps)
        number("tolerance", self.tolerance, low=0)
        number("rtol", self.rtol, low=0)
        choice("on_failure", self.on_failure, OnFailure)

    exponents: ClassVar[tuple[float, ...] | None] = None
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense,)

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> Eigen:
        """``Q diag(s ** exponent) Q^T``; an Eigen, so that it can be the previous one of the next call.

        Raises:
            NotConvergedError: If the off-diagonal fraction exceeds ``rtol`` and ``on_failure`` is "raise".
            SolverError: As :meth:`Eigh.power`.
        """
        self.check_serves(op, exponent)
        assert isinstance(op, Dense)
        old = previous.basis if isinstance(previous, Eigen) else None
        values, basis = self.basis(op, old.matrix if isinstance(old, Dense) else None)
        matrix = widen(op.matrix)
        fraction = off_diagonal_fraction(basis.mT @ (matrix / power_of_two(matrix)) @ basis)
        if bool((fraction > self.rtol).any()):
            not_converged(
                f"Subspace has not converged on {op!r}: the off-diagonal part is {float(fraction.max()):.3g} of the "
                f"norm, wanted {self.rtol:g}. Refresh more often, take more steps, or use Eigh().",
                self.on_failure,
            )
        return Eigen(Dense(basis), self.computed_power(values, exponent, op))

    def basis(self, matrix: Tensor | Dense, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rayleigh quotients ``(*stack, n)`` and the stepped basis ``(*stack, n, n)``, columns in their old order."""
        op = matrix if isinstance(matrix, Dense) else Dense(matrix)
        if previous is None:
            return Eigh().basis(op)
        a, size, q = self._stepped(op, previous)
        return (q * (a @ q)).sum(-2) * size.squeeze(-1), q

    def improve(self, matrix: Tensor | Dense, previous: Tensor) -> Tensor:
        """The basis of :meth:`basis` alone, without the product for its quotients.

        Args:
            matrix: ``(*stack, n, n)``.
            previous: The orthonormal basis to start from.
        """
        return self._stepped(matrix if isinstance(matrix, Dense) else Dense(matrix), previous)[2]

    def _stepped(self, op: Dense, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The matrix in units of a size, the size, and the stepped basis."""
        require_symmetric(op)
        a = widen(op.matrix)
        size = power_of_two(a)  # norms of products leave the floating range before the entries do
        a, rows = a / size, previous.to(a).mT.contiguous()  # rows are what LAPACK takes for columns
        for step in range(self.steps):
            product = rows @ a  # A q_j, as the matrix is symmetric
            quotients = (rows * product).sum(-1)
            norm = torch.linalg.vector_norm(product, dim=(-2, -1), keepdim=True)  # that of A, as Q is orthonormal
            if step == 0:
                require(torch.isfinite(norm).all(), lambda: non_finite(op))
                if self.tolerance and bool((off_diagonal_fraction(product @ rows.mT) <= self.tolerance).all()):
                    break
            # Null directions would drown in the rounding errors eps |A| of A Q; a shift keeps them, and all
            # eigenvectors. They turn by eps / shift, so that float64 has them to 2e-10 whatever the order of a sum.
            shift = torch.where(norm > 0, max(torch.finfo(a.dtype).eps ** 0.5, 1e-6) * norm, 1)  # zero keeps its basis
            rows = _orthonormal(product.addcmul_(rows, shift), quotients.abs(), quotients + shift.squeeze(-1) < 0)
        return a, size, rows.mT


def off_diagonal_fraction(matrix: Tensor) -> Tensor:
    """Frobenius norm of the off-diagonal part over that of the matrix, ``(*stack,)``; 0 for a zero matrix."""
    diagonal = torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    whole = torch.linalg.matrix_norm(matrix)
    return torch.linalg.matrix_norm(matrix - diagonal) / torch.where(whole == 0, 1, whole)


def _orthonormal(rows: Tensor, sizes: Tensor, opposite: Tensor) -> Tensor:
    r"""The orthonormalised rows :math:`A q_j`, from the largest size on, where the fixed point is stable.

    Args:
        rows: ``(*stack, n, n)``.
        sizes: :math:`|q_j^\top A q_j|`.
        opposite: Whether the row points away from :math:`q_j`; the new one does not.
    """
    n = rows.shape[-1]
    order = sizes.reshape(-1, n).argsort(-1, descending=True)
    places = (order + n * torch.arange(len(order), device=order.device).unsqueeze(-1)).flatten()
    reflectors, tau = torch.geqrf(rows.reshape(-1, n)[places].reshape(rows.shape).mT)
    new = torch.linalg.householder_product(reflectors, tau).mT.reshape(-1, n)
    flips = (reflectors.diagonal(dim1=-2, dim2=-1).flatten() < 0) ^ opposite.flatten()[places]
    new *= torch.where(flips, -1.0, 1.0).to(new).unsqueeze(-1)
    return torch.empty_like(new).index_copy_(0, places, new).reshape(rows.shape)
