"""Base of iterations for matrix roots: matrix products after a scaling, checked at the end."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from solvers.operators.decompositions import power_of_two
from solvers.operators.dense import Dense, non_finite, require_symmetric
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, number, whole
from solvers.outcome.finite import is_finite
from solvers.outcome.solution import OnFailure, Solution, SolveInfo, not_converged
from solvers.precision import widen
from solvers.solver import Solver


class MatrixIteration(Solver):
    """Roots of symmetric positive definite matrices by matrix products only, which accelerators do best.

    Attributes:
        rtol: Bound of the true residual: ``|X^p A - I| <= rtol sqrt(n)`` for ``X = A^(-1/p)``, and
            ``|X^2 - A| <= rtol |A|`` for the square root; in Frobenius norm. None takes ``10 sqrt(eps)``.
        max_steps: Steps at most.
        on_failure: Whether to "warn" or to "raise" if the residual is not met; never silent.
    """

    needs: ClassVar[tuple[type[LinearOperator], ...]] = (Dense,)

    def __post_init__(self) -> None:
        """Validate the arguments."""
        number("rtol", self.rtol, low=0, optional=True)
        whole("max_steps", self.max_steps)
        choice("on_failure", self.on_failure, OnFailure)

    @property
    @abstractmethod
    def rtol(self) -> float | None:
        """See the class."""

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """See the class."""

    @property
    @abstractmethod
    def on_failure(self) -> OnFailure:
        """See the class."""

    @abstractmethod
    def iterate(self, matrix: Tensor, exponent: float) -> tuple[Tensor, int]:
        """The power of ``(*stack, n, n)`` and the number of steps."""

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> Dense:
        """``op ** exponent`` of a Dense, block by block for a stack.

        Raises:
            NotConvergedError: If the residual is not met and ``on_failure`` is "raise", or the iteration diverged.
            NotSymmetricError: If the matrix is not symmetric.
            NonFiniteError: If it holds NaN or infinity.
        """
        self.check_serves(op, exponent)
        assert isinstance(op, Dense)
        solution = self.run(op, exponent)
        info = solution.info
        if bool(info.converged.all()):
            return Dense(solution.x)
        worst = float(info.residual.nan_to_num(float("inf"), float("inf")).max())
        not_converged(
            f"{type(self).__name__} has not converged on {op!r} ** {exponent:g} in {info.iterations} steps: the "
            f"residual is {worst:.3g}, wanted {float(info.tolerance.min()):.3g}. The matrix must be positive definite "
            "and not too badly conditioned: use more damping, more max_steps, float64 or Eigh().",
            "raise" if worst == float("inf") else self.on_failure,
        )
        return Dense(solution.x)

    def run(self, op: Dense, exponent: float) -> Solution:
        """As :meth:`power`, but returns the report without judging it; ``x`` is the matrix."""
        require_symmetric(op)
        matrix = widen(op.matrix)
        if not is_finite(matrix):
            raise non_finite(op)
        size = power_of_two(matrix)  # squared norms leave the floating range before the entries do
        matrix = matrix / size
        root, steps = self.iterate(matrix, exponent)
        residual = _residual(root, matrix, exponent)
        root = root * size**exponent
        residual = torch.where(torch.isfinite(root).all(-1).all(-1), residual, torch.inf)  # by overflow
        rtol = 10 * torch.finfo(matrix.dtype).eps ** 0.5 if self.rtol is None else self.rtol
        return Solution(root, SolveInfo(steps, residual, torch.full_like(residual, rtol), residual <= rtol))


def settled(error: Tensor, before: Tensor, n: int) -> bool:
    """Whether an iteration is at rounding level in every block, or has diverged; one read from the device."""
    done = (error <= n * torch.finfo(error.dtype).eps) | ((error < 1e-2) & (error >= before)) | ~torch.isfinite(error)
    return bool(done.all())


def distance_to_identity(matrix: Tensor) -> Tensor:
    """``|M - I| / sqrt(n)`` in Frobenius norm, ``(*stack,)``."""
    n = matrix.shape[-1]
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.matrix_norm(matrix - identity) / max(n, 1) ** 0.5


def _residual(root: Tensor, matrix: Tensor, exponent: float) -> Tensor:
    if exponent > 0:
        power = torch.linalg.matrix_power(root, round(1 / exponent))
        size = torch.linalg.matrix_norm(matrix)
        return torch.linalg.matrix_norm(power - matrix) / torch.where(size == 0, 1, size)
    return distance_to_identity(torch.linalg.matrix_power(root, round(-1 / exponent)) @ matrix)
