"""Base of iterative solvers: batches, tolerances, warm starts, the true residual and the report.

Axis letters: m right-hand sides, n entries of ``in_shape``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.operators.bases import Wrapper
from solvers.operators.linear_operator import LinearOperator, Shape
from solvers.outcome.errors import NonFiniteError, StructureError
from solvers.outcome.progress import progress_bar
from solvers.outcome.solution import OnFailure, Solution, SolveInfo, report
from solvers.solver import Solver

_RESTARTS = 3

Callback = Callable[[int, Tensor], None]
"""Called after each step with its number and the iterates ``(*batch, *in_shape)``; must not write to them."""


@dataclass(frozen=True, eq=False)
class LinearSystem:
    """``A x = b`` for m flattened right-hand sides: the input of an iteration.

    Attributes:
        op: The operator, for error messages.
        product: ``(m, n)`` to ``(m, n')``.
        rproduct: The adjoint's product.
        precondition: Product with the preconditioner, by default the identity.
        b: Right-hand sides ``(m, n')``.
        x: Initial guess ``(m, n)``.
        tolerance: Norm that each residual has to reach, ``(m,)``.
        max_steps: Number of steps at most.
        step: To be called after each step with its number and the iterates.
    """

    op: LinearOperator
    product: Callable[[Tensor], Tensor]
    rproduct: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor]
    b: Tensor
    x: Tensor
    tolerance: Tensor
    max_steps: int
    step: Callable[[int, Tensor], None]

    def all_done(self, done: Tensor, step: int) -> bool:
        """Whether every right-hand side is done; reads back from an accelerator every tenth step only."""
        return (done.device.type == "cpu" or step % 10 == 0) and bool(done.all())


@dataclass(frozen=True, eq=False)
class Iterate:
    """Result of an iteration, for m right-hand sides.

    Attributes:
        x: Solutions ``(m, n)``.
        steps: Steps taken.
        stopped: Which ones met a stopping rule other than the residual's, ``(m,)``.
        negative: Which ones met negative curvature, ``(m,)``.
        direction: The direction of it, ``(m, n)``.
    """

    x: Tensor
    steps: int
    stopped: Tensor | None = None
    negative: Tensor | None = None
    direction: Tensor | None = None

    def may_restart(self, max_steps: int) -> bool:
        """Whether steps are left and every row obeys the residual's rule alone."""
        flags = [flag for flag in (self.stopped, self.negative) if flag is not None]
        return self.steps < max_steps and not any(bool(flag.any()) for flag in flags)

    def after(self, before: Iterate) -> Iterate:
        """This iterate with the steps of the one it started from."""
        return replace(self, steps=self.steps + before.steps)


class IterativeSolver(Solver):
    """A solver that knows the operator by its products."""

    exponents: ClassVar[tuple[float, ...] | None] = (-1,)
    needs: ClassVar[tuple[type[LinearOperator], ...]] = (LinearOperator,)
    needs_symmetric: ClassVar[bool] = True

    @property
    @abstractmethod
    def rtol(self) -> float:
        """Residual wanted, relative to the right-hand side."""

    @property
    @abstractmethod
    def atol(self) -> float:
        """Residual wanted at least, absolute."""

    @property
    @abstractmethod
    def max_steps(self) -> int | None:
        """Steps at most; None means ten times the dimension."""

    @property
    @abstractmethod
    def preconditioner(self) -> LinearOperator | None:
        """Positive definite operator near the inverse, or None."""

    @property
    @abstractmethod
    def on_failure(self) -> OnFailure:
        """Whether to "warn" or to "raise" if the tolerance is not met."""

    @property
    @abstractmethod
    def progress(self) -> bool | None:
        """True shows a progress bar, False never, None after a second."""

    @abstractmethod
    def iterate(self, system: LinearSystem) -> Iterate:
        """Run the iteration."""

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> IterativeInverse:
        """The inverse as an operator: each product runs the iteration."""
        self.check_serves(op, exponent)
        self._check(op)
        return IterativeInverse(op, self)

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Tensor:
        """Solution of ``op @ x = b``.

        Args:
            op: The operator.
            b: Right-hand sides ``(*batch, *out_shape)``.
            x0: Initial guess ``(*batch, *in_shape)``; zero if left out.

        Raises:
            NotConvergedError: If the tolerance is not met and ``on_failure`` is "raise"; otherwise it is a warning.
            SolverError: If the operator is not of the kind that the solver serves.
        """
        solution = self.run(op, b, x0)
        report(solution.info, f"{type(self).__name__} on {op!r}", self.on_failure)
        return solution.x

    def run(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None = None, callback: Callback | None = None
    ) -> Solution:
        """As :meth:`solve`, but returns the report without judging it.

        Args:
            op: The operator.
            b: Right-hand sides ``(*batch, *out_shape)``.
            x0: Initial guess ``(*batch, *in_shape)``; zero if left out.
            callback: Sees each iterate.
        """
        self._check(op)
        batch = _batch_shape(b, op.out_shape, "b", op)
        if b.dtype != op.dtype:
            raise TypeError(f"{op!r} is {op.dtype} and b is {b.dtype}. Convert one: b.to({op.dtype}).")
        m, (rows, n) = prod(batch), op.shape
        flat_b = b.reshape(m, rows)
        if x0 is None:
            x = b.new_zeros(m, n)
        else:
            if _batch_shape(x0, op.in_shape, "x0", op) != batch:
                raise ValueError(f"x0 {tuple(x0.shape)} and b {tuple(b.shape)} need the same batch.")
            x = x0.reshape(m, n)
        rproduct = _flat_product(op if self.needs_symmetric else op.adjoint())
        size = self.size(flat_b, rproduct)
        x = torch.where(size.unsqueeze(-1) == 0, 0, x)  # A x = 0 has the solution 0, whatever the guess
        tolerance = (self.rtol * size).clamp(min=self.atol)
        max_steps = 10 * n if self.max_steps is None else self.max_steps
        with progress_bar(max_steps, type(self).__name__, self.progress) as bar:
            system = LinearSystem(
                op=op,
                product=_flat_product(op),
                rproduct=rproduct,
                precondition=_identity if self.preconditioner is None else _flat_product(self.preconditioner),
                b=flat_b,
                x=x,
                tolerance=tolerance,
                max_steps=max_steps,
                step=_on_step(bar, callback, (*batch, *op.in_shape)),
            )
            result = self.iterate(system)
            residual = self.residual(system, result.x)
            # The recursions drift from the true residual by rounding; a restart corrects this.
            for _ in range(_RESTARTS):
                if not result.may_restart(system.max_steps) or not bool((residual > tolerance).any()):
                    break
                result = self.iterate(replace(system, x=result.x, max_steps=max_steps - result.steps)).after(result)
                residual = self.residual(system, result.x)
        if not bool(torch.isfinite(residual).all()):
            raise NonFiniteError(
                f"{type(self).__name__} on {op!r} met NaN or infinity: in the operator, in b, or by overflow. Check "
                "them, or use float64."
            )
        converged = residual <= tolerance
        if result.stopped is not None:
            converged = converged | result.stopped
        info = SolveInfo(
            iterations=result.steps,
            residual=residual.reshape(batch),
            tolerance=tolerance.reshape(batch),
            converged=converged.reshape(batch),
            negative_curvature=None if result.negative is None else result.negative.reshape(batch),
            direction=None if result.direction is None else result.direction.reshape(*batch, *op.in_shape),
        )
        return Solution(result.x.reshape(*batch, *op.in_shape), info)

    def residual(self, system: LinearSystem, x: Tensor) -> Tensor:
        """``|b - A x|``, recomputed, ``(m,)``."""
        return torch.linalg.vector_norm(system.b - system.product(x), dim=-1)

    def size(self, b: Tensor, rproduct: Callable[[Tensor], Tensor]) -> Tensor:
        """The size that ``rtol`` is relative to, ``(m,)``: ``|b|``."""
        return torch.linalg.vector_norm(b, dim=-1)

    def _check(self, op: LinearOperator) -> None:
        name = type(self).__name__
        if self.needs_symmetric and op.in_shape != op.out_shape:
            raise StructureError(f"{op!r} is not square, which {name} needs. LSMR() solves least squares.")
        if self.needs_symmetric and not op.symmetric:
            raise StructureError(
                f"{name} needs a symmetric operator, and {op!r} is not known to be one. Say symmetric=True where it is "
                "a Function, or use LSMR()."
            )
        if self.preconditioner is not None and self.preconditioner.in_shape != op.in_shape:
            raise ValueError(f"The preconditioner acts on {self.preconditioner.in_shape}, {op!r} on {op.in_shape}.")


@dataclass(frozen=True, eq=False, repr=False)
class IterativeInverse(Wrapper):
    """``op^-1``; each product solves ``op @ x = b`` with ``solver``. Linear up to the solver's tolerance."""

    op: LinearOperator
    solver: IterativeSolver

    @property
    def in_shape(self) -> Shape:
        return self.op.out_shape

    @property
    def out_shape(self) -> Shape:
        return self.op.in_shape

    def apply(self, x: Tensor) -> Tensor:
        return self.solver.solve(self.op, x)

    def adjoint(self) -> IterativeInverse:
        return self if self.symmetric else IterativeInverse(self.op.adjoint(), self.solver)

    def __repr__(self) -> str:
        return f"IterativeInverse({self.op!r}, {type(self.solver).__name__})"


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each row, ``(m, n), (m, n) -> (m,)``."""
    return (x * y).sum(-1)


def divide(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, and 0 where y is 0: a finished row stays where it is."""
    return torch.where(y == 0, 0, x / torch.where(y == 0, 1, y))


def _identity(x: Tensor) -> Tensor:
    return x


def _flat_product(op: LinearOperator) -> Callable[[Tensor], Tensor]:
    return lambda x: (op @ x.reshape(x.shape[0], *op.in_shape)).reshape(x.shape[0], op.shape[0])


def _on_step(bar: tqdm, callback: Callback | None, shape: Shape) -> Callable[[int, Tensor], None]:
    def step(number: int, x: Tensor) -> None:
        bar.update()
        if callback is not None:
            callback(number, x.reshape(shape))

    return step


def _batch_shape(x: Tensor, shape: Shape, name: str, op: LinearOperator) -> Shape:
    start = x.ndim - len(shape)
    if start < 0 or tuple(x.shape[start:]) != shape:
        raise ValueError(
            f"{name} for {op!r} has the shape (*batch, {', '.join(map(str, shape))}), not {tuple(x.shape)}."
        )
    return tuple(x.shape[:start])
