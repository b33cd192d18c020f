"""Coupled Newton iteration for inverse p-th roots, as Shampoo uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.iterative.matrix_iteration import MatrixIteration, distance_to_identity, settled
from solvers.operators.dense import symmetric_part
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.errors import StructureError
from solvers.outcome.solution import OnFailure


@dataclass(frozen=True)
class CoupledNewton(MatrixIteration):
    r"""``A^(-1/p)`` of positive definite matrices for an integer p, by matrix products alone.

    .. math:: T = ((p + 1) I - M) / p, \quad X \leftarrow X T, \quad M \leftarrow T^p M, \qquad X_0 = z^{1/p} I,
        \quad M_0 = z A, \quad z = (p + 1) / (2 |A|)

    with M going to I. Quadratic once near; before, the smallest eigenvalue of M grows by ``(1 + 1/p)^p`` per step.

    Args:
        rtol: Bound of the true residual ``|X^p A - I| <= rtol sqrt(n)`` in Frobenius norm. None takes ``10 sqrt(eps)``.
        max_steps: Steps at most.
        on_failure: Whether to "warn" or to "raise" if the residual is not met; never silent.

    References:
        Guo and Higham (2006), https://doi.org/10.1137/050643374; Anil et al. (2020), https://arxiv.org/abs/2002.09018
    """

    rtol: float | None = None
    max_steps: int = 100
    on_failure: OnFailure = "warn"

    exponents: ClassVar[tuple[float, ...] | None] = None

    def check_serves(self, op: LinearOperator, exponent: float) -> None:
        """Refuse what is not ``-1/p``."""
        if exponent >= 0 or abs(1 / exponent - round(1 / exponent)) > 1e-9:
            raise StructureError(f"CoupledNewton raises to -1/p for an integer p, not to {exponent:g}. Use Eigh().")
        super().check_serves(op, exponent)

    def iterate(self, matrix: Tensor, exponent: float) -> tuple[Tensor, int]:
        """Run the iteration."""
        p, n = round(-1 / exponent), matrix.shape[-1]
        size = torch.linalg.matrix_norm(matrix)[..., None, None]  # Frobenius: at least the largest eigenvalue
        z = (p + 1) / (2 * torch.where(size == 0, 1, size))
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        x, m = z ** (1 / p) * identity, z * matrix
        error = torch.full_like(m[..., 0, 0] if n else m.sum((-2, -1)), float("inf"))
        for step in range(self.max_steps):
            before, error = error, distance_to_identity(m)
            if settled(error, before, n):
                return symmetric_part(x), step
            factor = ((p + 1) * identity - m) / p
            x, m = x @ factor, torch.linalg.matrix_power(factor, p) @ m
        return symmetric_part(x), self.max_steps
