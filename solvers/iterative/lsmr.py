"""Least squares with rectangular, singular or asymmetric operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from solvers.iterative.base import Iterate, IterativeSolver, LinearSystem, divide
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import number
from solvers.outcome.solution import OnFailure


@dataclass(frozen=True)
class LSMR(IterativeSolver):
    r"""Minimises ``|b - A x|^2 + damp^2 |x|^2``; one product with A and one with its adjoint per step.

    Golub-Kahan bidiagonalisation: MINRES on the normal equations, without forming them. From a zero guess it finds the
    solution of least norm; for a square invertible A the inverse.

    Args:
        rtol: Stop when ``|A^T (b - A x) - damp^2 x| <= max(rtol |A^T b|, atol)``; the report holds this residual.
        atol: See ``rtol``; in units of ``A^T b``.
        max_steps: Steps at most; None means ten times the number of unknowns.
        damp: Tikhonov term; its square is in units of ``A^T A``.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    References:
        Fong and Saunders (2011), https://doi.org/10.1137/10079687X
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int | None = None
    damp: float = 0.0
    on_failure: OnFailure = "warn"
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        super().__post_init__()
        number("damp", self.damp, low=0)

    exponents: ClassVar[tuple[float, ...] | None] = (-1,)
    needs_symmetric: ClassVar[bool] = False

    @property
    def preconditioner(self) -> LinearOperator | None:
        """None: scale the columns of A instead."""
        return None

    def rescaled(self, size: float) -> LSMR:
        """The same term for ``A / size``."""
        return self if size == 1 else replace(self, damp=self.damp / size)

    def residual_units(self, size: float) -> float:
        """The residual is that of the normal equations, with a factor ``A^T``."""
        return size

    def size(self, b: Tensor, rproduct: Callable[[Tensor], Tensor]) -> Tensor:
        """``|A^T b|``, ``(m,)``."""
        return torch.linalg.vector_norm(rproduct(b), dim=-1)

    def residual(self, system: LinearSystem, x: Tensor) -> Tensor:
        """``|A^T (b - A x) - damp^2 x|``, recomputed, ``(m,)``."""
        normal = system.rproduct(system.b - system.product(x)) - self.damp**2 * x
        return torch.linalg.vector_norm(normal, dim=-1)

    def iterate(self, system: LinearSystem) -> Iterate:
        """Run the iteration on the stacked operator ``[A; damp I]``; letters as in the paper."""

        def product(v: Tensor) -> Tensor:
            return torch.cat([system.product(v), self.damp * v], -1)

        def rproduct(u: Tensor) -> Tensor:
            top, bottom = u.split([u.shape[-1] - system.x.shape[-1], system.x.shape[-1]], -1)
            return system.rproduct(top) + self.damp * bottom

        x = system.x
        u, beta = _normalise(torch.cat([system.b, torch.zeros_like(x)], -1) - product(x))
        v, alpha = _normalise(rproduct(u))
        alpha_bar, zeta_bar = alpha, alpha * beta  # |zeta_bar| is the residual of the normal equations
        rho, rho_bar, c_bar = torch.ones_like(beta), torch.ones_like(beta), torch.ones_like(beta)
        s_bar = torch.zeros_like(beta)
        h, h_bar = v, torch.zeros_like(v)
        done = zeta_bar <= system.tolerance
        step = 0
        while step < system.max_steps and not system.all_done(done, step):
            step += 1
            u, beta = _normalise(product(v) - alpha.unsqueeze(-1) * u)
            v, alpha = _normalise(rproduct(u) - beta.unsqueeze(-1) * v)

            rho_before, rho = rho, torch.hypot(alpha_bar, beta)
            c, s = divide(alpha_bar, rho), divide(beta, rho)
            theta, alpha_bar = s * alpha, c * alpha

            rho_bar_before, theta_bar, diagonal = rho_bar, s_bar * rho, c_bar * rho
            rho_bar = torch.hypot(diagonal, theta)
            c_bar, s_bar = divide(diagonal, rho_bar), divide(theta, rho_bar)
            zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar

            h_bar = h - divide(theta_bar * rho, rho_before * rho_bar_before).unsqueeze(-1) * h_bar
            change = divide(zeta, rho * rho_bar).unsqueeze(-1) * h_bar
            x = torch.where(done.unsqueeze(-1), x, x + change)
            h = v - divide(theta, rho).unsqueeze(-1) * h
            done = done | ~(zeta_bar.abs() > system.tolerance)  # NaN is done as well
            system.step(step, x)
        return Iterate(x, step)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1)
    return divide(x, norm.unsqueeze(-1)), norm
