"""Conjugate gradients for positive definite operators known by their products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from solvers.iterative.base import Iterate, IterativeSolver, LinearSystem, divide, dot
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, number
from solvers.outcome.errors import NotPositiveDefiniteError
from solvers.outcome.solution import OnFailure

NegativeCurvature = Literal["raise", "stop"]


@dataclass(frozen=True)
class CG(IterativeSolver):
    r"""Preconditioned conjugate gradients; one product per step, four vectors per right-hand side.

    A batch of right-hand sides shares its products; each stops on its own. The error falls by
    :math:`(\sqrt\kappa - 1) / (\sqrt\kappa + 1)` per step in the norm of A.

    Args:
        rtol: Stop when ``|b - A x| <= max(rtol |b|, atol)``.
        atol: See ``rtol``; in units of b.
        max_steps: Steps at most; None means ten times the dimension.
        preconditioner: Symmetric positive definite operator near ``A^-1``.
        stop: "residual", or "progress" for Martens' rule on ``phi(x) = x^T A x / 2 - b^T x``: stop after step k when
            ``phi < 0`` and the last ``K = max(10, k / 10)`` steps gained less than ``K * min_progress`` of it. The
            residual's rule holds beside it.
        min_progress: Relative gain per step below which "progress" stops.
        negative_curvature: What to do when a direction ``p`` has ``p^T A p <= 0``: "raise", or "stop" that right-hand
            side at the iterate before, which the report marks as not converged, with the direction.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Raises:
        NotPositiveDefiniteError: For negative curvature, unless asked to stop.

    References:
        Hestenes and Stiefel (1952); Martens (2010), section 4.4, for the rule on progress.
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: LinearOperator | None = None
    stop: Literal["residual", "progress"] = "residual"
    min_progress: float = 5e-4
    negative_curvature: NegativeCurvature = "raise"
    on_failure: OnFailure = "warn"
    progress: bool | None = None

    exponents: ClassVar[tuple[float, ...] | None] = (-1,)

    def __post_init__(self) -> None:
        """Validate the arguments."""
        super().__post_init__()
        choice("stop", self.stop, ("residual", "progress"))
        number("min_progress", self.min_progress, low=0)
        choice("negative_curvature", self.negative_curvature, NegativeCurvature)

    def iterate(self, system: LinearSystem) -> Iterate:
        """Run the iteration; a finished row keeps its iterate, so a late read returns the same one."""
        x, b = system.x, system.b
        r = b - system.product(x)
        z = system.precondition(r)
        p, rz = z, dot(r, z)
        done = torch.linalg.vector_norm(r, dim=-1) <= system.tolerance
        stopped = torch.zeros_like(done)
        negative = torch.zeros_like(done)
        direction = torch.zeros_like(x)
        values = [_quadratic(x, b, r)]
        step = 0
        while step < system.max_steps and not system.all_done(done, step):
            step += 1
            product = system.product(p)
            curvature = dot(p, product)
            bad = ~done & (curvature <= 0)
            if self.negative_curvature == "raise":
                self._refuse(bad, curvature, p, system, step)
            negative, done = negative | bad, done | bad
            direction = torch.where(bad.unsqueeze(-1), p, direction)
            alpha = torch.where(done, 0, divide(rz, curvature)).unsqueeze(-1)  # rz / p^T A p
            x = x + alpha * p
            r = r - alpha * product
            z = system.precondition(r)
            rz, rz_before = dot(r, z), rz
            p = z + divide(rz, rz_before).unsqueeze(-1) * p
            done = done | ~(torch.linalg.vector_norm(r, dim=-1) > system.tolerance)  # NaN is done as well
            if self.stop == "progress":
                values.append(_quadratic(x, b, r))
                window = max(10, step // 10)
                if step > window:
                    gain = values[-1] - values[-1 - window]  # negative: phi falls
                    slow = (values[-1] < 0) & (gain > window * self.min_progress * values[-1]) & ~done
                    stopped, done = stopped | slow, done | slow
            system.step(step, x)
        return Iterate(x, step, stopped, negative, direction)

    def _refuse(self, bad: Tensor, curvature: Tensor, p: Tensor, system: LinearSystem, step: int) -> None:
        # Reading this back at every step is the price of stopping at the right one; on an accelerator "stop" is free.
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            value = float(curvature[index] / dot(p[index], p[index])) * system.size
            raise NotPositiveDefiniteError(
                f"CG met the curvature {value:.3g} in step {step}: {system.op!r} is not positive definite. Use more "
                "damping, MINRES() for an indefinite operator, or negative_curvature='stop' to keep the iterate before."
            )


def _quadratic(x: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """``x^T A x / 2 - b^T x`` from the residual ``r = b - A x``."""
    return -dot(x, r + b) / 2
