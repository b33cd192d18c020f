r"""Lanczos tridiagonalisation and the Gauss quadrature that comes with it: :math:`v^\top f(A) v` by products with A.

From a unit vector v, k steps give a tridiagonal T whose eigenvalues :math:`\theta_j` and squared first components
:math:`w_j` of the eigenvectors are a quadrature, :math:`v^\top f(A) v \approx \sum_j w_j f(\theta_j)`, exact for
polynomials of degree ``2 k - 1``. Golub and Meurant (2010), Matrices, Moments and Quadrature, chapters 4 and 6.

Axis letters: m starting vectors, n unknowns, k steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from solvers.estimates.probes import FlatProduct, norm
from solvers.operators.decompositions import eigendecomposition
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.errors import NonFiniteError


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Quadratures of m starting vectors, and coarser ones of fewer steps that tell their error.

    Attributes:
        nodes: Eigenvalues ``(m, k)``, float64.
        weights: Squared first components ``(m, k)``; each row sums to one.
        coarser: Nodes and weights after three quarters of the steps, and after half of them.
    """

    nodes: Tensor
    weights: Tensor
    coarser: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def steps(self) -> int:
        """Number of steps k."""
        return self.nodes.shape[1]

    def apply(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Integral of an entrywise function for each starting vector, and how it was reached.

        Returns:
            Integrals ``(m, *shape)`` where ``function`` maps ``(m, k)`` to ``(m, k, *shape)``; and what the third and
            the last quarter of the steps changed, ``(2, m, *shape)``.
        """
        fine = _weighted(self.weights, function(self.nodes))
        middle, coarse = (_weighted(weights, function(nodes)) for nodes, weights in self.coarser)
        return fine, torch.stack([middle - coarse, fine - middle])


# Ratio of two changes, from k / 2 over 3 k / 4 to k steps, of a result that grows with log(k) and never converges.
_DIVERGES = log(4 / 3) / log(3 / 2)


def remaining(changes: Tensor) -> Tensor:
    """Error that is left after two quarters of the steps have changed a result by ``changes (2, *shape)``.

    For an error that falls with ``k^-p`` the ratio r of the two tells p, and with it the error as a multiple of the
    last change: ``1.3 r / (0.71 - r)`` within 6 % for p from 1/2 to 2. Faster, geometric convergence leaves less. The
    last change itself is the least that is reported, a hundred times it the most: then convergence has not set in.
    """
    before, last = changes.abs()
    ratio = torch.where(before > 0, last / torch.where(before > 0, before, 1), 0).clamp(max=_DIVERGES - 1e-6)
    return last * (1.3 * ratio / (_DIVERGES - ratio)).clamp(1, 100)


Enough = Callable[[Quadrature], bool]


def quadrature(
    op: LinearOperator, product: FlatProduct, start: Tensor, steps: int, enough: Enough | None = None
) -> Quadrature:
    """Lanczos from each row of ``start``, without reorthogonalisation.

    Rounding brings copies of eigenvalues that have converged; they share the weight of the one they copy, so integrals
    do not suffer (Greenbaum, 1989), and three vectors are kept in place of k.

    Args:
        op: The operator, for error messages.
        product: Products with it.
        start: Vectors ``(m, n)``; scaled to unit norm here.
        steps: Steps at most.
        enough: Whether to stop; asked from step 8 on, each time the number of steps has grown by a quarter.

    Raises:
        NonFiniteError: If a product holds NaN or infinity.
    """
    size = norm(start)
    v = start / _divisor(size, start)
    before, beta = torch.zeros_like(v), torch.zeros_like(size)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    look = 8
    for step in range(1, min(steps, v.shape[1]) + 1):
        w = torch.addcmul(product(v), before, beta.to(v.dtype).unsqueeze(-1), value=-1)  # may be v itself: a new tensor
        alpha = (v * w).sum(-1).double()
        # An exhausted space continues with zero vectors. They carry no weight; the eigenvalue shown for them is
        # one of the spectrum's hull, where functions are defined.
        alphas.append(torch.where(size > 0, alpha, alphas[0] if alphas else alpha))
        w.addcmul_(v, alpha.to(v.dtype).unsqueeze(-1), value=-1)
        size = beta = norm(w)
        before, v = v, w.div_(_divisor(size, w))
        if enough is not None and look <= step < steps:
            look = step + step // 4
            result = _gauss(op, alphas, betas)
            if enough(result):
                return result
        betas.append(beta)
    return _gauss(op, alphas, betas[:-1])


def _gauss(op: LinearOperator, alphas: list[Tensor], betas: list[Tensor]) -> Quadrature:
    diagonal = torch.stack(alphas, -1)  # (m, k)
    beside = torch.stack(betas, -1) if betas else diagonal[:, :0]
    k = diagonal.shape[1]
    if not bool(torch.isfinite(diagonal).all() & torch.isfinite(beside).all()):
        raise NonFiniteError(
            f"Lanczos on {op!r} met NaN or infinity: in the operator, or by overflow of {op.dtype}. Leave the batch "
            "that caused it out, or use float64."
        )
    matrix = diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)
    middle, coarse = max(1, k - max(1, k // 4)), max(1, k // 2)
    return Quadrature(*_nodes(matrix), (_nodes(matrix[:, :middle, :middle]), _nodes(matrix[:, :coarse, :coarse])))


def _nodes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = eigendecomposition(matrix)
    return values, vectors[:, 0].square()


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("mk,mk...->m...", weights, values)


def _divisor(size: Tensor, x: Tensor) -> Tensor:
    """Norms as divisors of the rows of x; those of zero rows are one."""
    size = size.to(x.dtype).unsqueeze(-1)
    return torch.where(size > 0, size, 1)
