"""Minimal residuals for symmetric operators, definite or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from solvers.iterative.base import Iterate, IterativeSolver, LinearSystem, divide, dot
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.solution import OnFailure


@dataclass(frozen=True)
class MINRES(IterativeSolver):
    """Minimises ``|b - A x|`` over Krylov spaces; one product per step, for Hessians with eigenvalues of both signs.

    Lanczos with Givens rotations, in the norm of the preconditioner. A batch of right-hand sides shares its products.

    Args:
        rtol: Stop when ``|b - A x| <= max(rtol |b|, atol)``.
        atol: See ``rtol``; in units of b.
        max_steps: Steps at most; None means ten times the dimension.
        preconditioner: Symmetric positive definite operator near ``|A|^-1``.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    References:
        Paige and Saunders (1975), https://doi.org/10.1137/0712047
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: LinearOperator | None = None
    on_failure: OnFailure = "warn"
    progress: bool | None = None

    exponents: ClassVar[tuple[float, ...] | None] = (-1,)

    def iterate(self, system: LinearSystem) -> Iterate:
        """Run the iteration; letters as in the paper, ``r`` is the true residual by its own recurrence."""
        x = system.x
        r = system.b - system.product(x)
        v_before, v = torch.zeros_like(r), r  # Lanczos vectors, times beta
        y = system.precondition(v)
        beta = dot(v, y).clamp(min=0).sqrt()
        beta_before = torch.ones_like(beta)
        phi = beta  # norm of the residual in the preconditioner's norm
        cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
        delta_bar = epsilon = torch.zeros_like(beta)
        w, w_before = torch.zeros_like(x), torch.zeros_like(x)
        done = torch.linalg.vector_norm(r, dim=-1) <= system.tolerance
        step = 0
        while step < system.max_steps and not system.all_done(done, step):
            step += 1
            q = divide(y, beta.unsqueeze(-1))
            y = system.product(q) - divide(beta, beta_before).unsqueeze(-1) * v_before
            alpha = dot(q, y)
            y = y - divide(alpha, beta).unsqueeze(-1) * v
            v_before, v = v, y
            y = system.precondition(v)
            beta_before, beta = beta, dot(v, y).clamp(min=0).sqrt()

            epsilon_before = epsilon
            delta = cosine * delta_bar + sine * alpha
            gamma_bar = sine * delta_bar - cosine * alpha
            epsilon, delta_bar = sine * beta, -cosine * beta
            gamma = torch.hypot(gamma_bar, beta)
            cosine, sine = divide(gamma_bar, gamma), divide(beta, gamma)
            tau, phi = cosine * phi, sine * phi

            w_before, w = (
                w,
                divide(q - epsilon_before.unsqueeze(-1) * w_before - delta.unsqueeze(-1) * w, gamma.unsqueeze(-1)),
            )
            moving = (~done).unsqueeze(-1)
            x = torch.where(moving, x + tau.unsqueeze(-1) * w, x)
            # r_k = s_k^2 r_(k-1) - phi_k c_k v_(k+1) / beta_(k+1)
            r = sine.square().unsqueeze(-1) * r - divide(phi * cosine, beta).unsqueeze(-1) * v
            done = done | ~(torch.linalg.vector_norm(r, dim=-1) > system.tolerance)
            system.step(step, x)
        return Iterate(x, step)
