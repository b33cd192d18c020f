"""The Neumann series, that is, Richardson's iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.iterative.base import Iterate, IterativeSolver, LinearSystem, divide
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import number
from solvers.outcome.solution import OnFailure


@dataclass(frozen=True)
class Neumann(IterativeSolver):
    r"""``x <- x + scale P (b - A x)``: the series :math:`A^{-1} = s \sum_k (I - s P A)^k P`, truncated when it fits.

    Slower than CG, by the condition number instead of its root, but linear in b and without inner products: the choice
    where a fixed polynomial in A is wanted (influence functions, implicit gradients). Converges for positive definite A
    and ``0 < scale < 2 / lambda_max(P A)``.

    Args:
        rtol: Stop when ``|b - A x| <= max(rtol |b|, atol)``.
        atol: See ``rtol``; in units of b.
        max_steps: Terms at most; None means ten times the dimension.
        scale: Step length; None takes ``1 / lambda_max``, estimated by ten products.
        preconditioner: Symmetric positive definite operator P near ``A^-1``.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    References:
        Agarwal, Bullins and Hazan (2017), https://arxiv.org/abs/1602.03943
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    scale: float | None = None
    preconditioner: LinearOperator | None = None
    on_failure: OnFailure = "warn"
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        super().__post_init__()
        number("scale", self.scale, low=0, open_low=True, optional=True)

    exponents: ClassVar[tuple[float, ...] | None] = (-1,)

    def iterate(self, system: LinearSystem) -> Iterate:
        """Run the iteration; a diverging row stops and is reported."""
        # The user's step is for A itself, and a preconditioner is scaled already.
        own = 1.0 if self.preconditioner is not None else system.size
        scale = self._scale(system) if self.scale is None else self.scale * own
        x = system.x
        r = system.b - system.product(x)
        norm = start = torch.linalg.vector_norm(r, dim=-1)
        done = norm <= system.tolerance
        step = 0
        while step < system.max_steps and not system.all_done(done, step):
            step += 1
            x = torch.where(done.unsqueeze(-1), x, x + scale * system.precondition(r))
            r = system.b - system.product(x)
            norm = torch.linalg.vector_norm(r, dim=-1)
            done = done | ~(norm > system.tolerance) | (norm > 1e6 * start)
            system.step(step, x)
        return Iterate(x, step)

    def _scale(self, system: LinearSystem) -> Tensor:
        # The power method stays below lambda_max; half of it would be enough for convergence.
        generator = torch.Generator(system.b.device).manual_seed(0)
        v = torch.randn(1, *system.x.shape[1:], generator=generator, dtype=system.b.dtype, device=system.b.device)
        for _ in range(10):
            v = divide(v, torch.linalg.vector_norm(v))
            v = system.precondition(system.product(v))
        return divide(torch.ones_like(v[0, 0]), torch.linalg.vector_norm(v))
