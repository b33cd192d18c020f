"""What a fit gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MESSAGES = {
    -1: "the residuals or their derivatives are not finite at the start",
    0: "the maximum number of evaluations is reached",
    1: "gtol: the residuals are orthogonal to their derivatives",
    2: "ftol: the cost no longer falls",
    3: "xtol: the steps no longer move the unknowns",
    4: "both ftol and xtol",
}


@dataclass(frozen=True)
class LeastSquaresResult:
    r"""The outcome of :func:`precond.least_squares`; fields of SciPy's ``OptimizeResult`` and an uncertainty.

    With ``batched=True`` every field has a first axis of problems.

    Attributes:
        x: The unknowns, as ``x0`` has them; a module itself.
        cost: :math:`\tfrac12 s^2 \sum \rho((r / s)^2)`.
        fun: Residuals ``(m,)``.
        jac: Jacobian ``(m, n)`` at the solution.
        grad: Gradient of the cost ``(n,)``.
        optimality: Largest cosine of the angle between the residuals and a column of the Jacobian, over unknowns that
            no bound holds.
        active_mask: -1 where the lower bound holds an unknown, 1 where the upper one does, else 0.
        nfev: Evaluations of the residuals.
        njev: Evaluations of the Jacobian.
        status: Why it stopped, see ``message``: -1, 0, 1, 2, 3 or 4.
        message: The same in words; of the first problem that failed, where one did.
        success: Whether a tolerance was met.
        covariance: :math:`s^2 (J^\top J)^{-1}` with :math:`s^2 = \sum r^2 / (m - n)`, ``(n, n)``: of the unknowns if
            the model is right, its residuals independent and of one variance, and the curvature of the residuals
            negligible. Rows of unknowns at a bound are zero.
        covariance_valid: Whether J has full rank, m > n, no bound is active, the loss is linear and the fit succeeded.
        rank: Numerical rank of the Jacobian.
    """

    x: Any
    cost: Tensor
    fun: Tensor
    jac: Tensor
    grad: Tensor
    optimality: Tensor
    active_mask: Tensor
    nfev: int
    njev: int
    status: Tensor
    message: str
    success: Tensor
    covariance: Tensor
    covariance_valid: Tensor
    rank: Tensor

    @property
    def stderr(self) -> Tensor:
        """Standard errors of the unknowns, in the order of the flat vector."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    def __getitem__(self, name: str) -> Any:
        """A field by name, as SciPy's result allows."""
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)


def covariance_of(jacobian: Tensor, residuals: Tensor, held: Tensor, trusted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance ``(problems, n, n)``, whether it can be trusted, and the rank of the Jacobian."""
    m, n = jacobian.shape[-2:]
    finite = jacobian.isfinite().all(-1).all(-1)
    jacobian = torch.where(finite[..., None, None], jacobian, 0.0)
    norms = torch.linalg.vector_norm(jacobian, dim=-2, keepdim=True)
    norms = torch.where(norms > 0, norms, 1.0)
    free = torch.where(held, 0.0, 1.0).unsqueeze(-2).to(jacobian.dtype)
    _, s, Vh = torch.linalg.svd(jacobian / norms * free, full_matrices=False)
    keep = s > torch.finfo(s.dtype).eps * max(m, n) * s[..., :1].clamp(min=torch.finfo(s.dtype).tiny)
    rank = keep.sum(-1)
    inverse = torch.where(keep, 1 / torch.where(keep, s, 1.0), 0.0).unsqueeze(-1) * Vh / norms
    variance = residuals.square().sum(-1) / max(m - n, 1)
    covariance = inverse.mT @ inverse * variance[..., None, None]
    free_count = (~held).sum(-1)
    covariance = torch.where(finite[..., None, None], covariance, torch.nan)
    valid = trusted & (rank == free_count) & ~held.any(-1) & torch.tensor(m > n, device=rank.device)
    return covariance, valid, rank
