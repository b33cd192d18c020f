"""Base of iterative solvers: batches, tolerances, warm starts, the true residual and the report.

Axis letters: m right-hand sides, n entries of ``in_shape``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor, inf, log2, prod
from typing import ClassVar, Self

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.operators.bases import Wrapper
from solvers.operators.decompositions import power_of_two
from solvers.operators.linear_operator import LinearOperator, Shape
from solvers.outcome.arguments import choice, flag, instance, number, whole
from solvers.outcome.errors import NonFiniteError, StructureError
from solvers.outcome.progress import progress_bar
from solvers.outcome.solution import OnFailure, Solution, SolveInfo, report
from solvers.precision import without_autocast
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
        size: Number that the products are divided by, and those with the preconditioner multiplied; a power of two.
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
    size: float = 1.0

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

    def __post_init__(self) -> None:
        """Validate the arguments that all have; subclasses go on with their own."""
        number("rtol", self.rtol, low=0)
        number("atol", self.atol, low=0)
        whole("max_steps", self.max_steps, optional=True)
        instance("preconditioner", self.preconditioner, LinearOperator, "a LinearOperator", optional=True)
        choice("on_failure", self.on_failure, OnFailure)
        flag("progress", self.progress, optional=True)

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

    @without_autocast
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
        instance("op", op, LinearOperator, "a LinearOperator such as Dense(matrix)")
        instance("b", b, Tensor, "a tensor")
        self._check(op)
        batch = _batch_shape(b, op.out_shape, "b", op)
        if b.dtype != op.dtype:
            raise TypeError(f"{op!r} is {op.dtype} and b is {b.dtype}. Convert one: b.to({op.dtype}).")
        if x0 is not None and _batch_shape(x0, op.in_shape, "x0", op) != batch:
            raise ValueError(f"x0 {tuple(x0.shape)} and b {tuple(b.shape)} need the same batch.")
        try:
            return self._run(op, b, x0, callback, batch, None)
        except _OutOfRange as found:
            size = found.size
        return self._run(op, b, x0, callback, batch, size)  # in units of the products, which are extreme

    def _run(
        self,
        op: LinearOperator,
        b: Tensor,
        x0: Tensor | None,
        callback: Callback | None,
        batch: Shape,
        size: float | None,
    ) -> Solution:
        """The solution by ``A / size`` (looked at first, if None), with right-hand sides near one in size."""
        m, (rows, n) = prod(batch), op.shape
        flat_b = b.reshape(m, rows)
        gauge = _Gauge(op.dtype, size)
        units = _Units(unit := gauge.unit(flat_b), gauge.known)
        flat_b = flat_b / unit
        x = b.new_zeros(m, n) if x0 is None else units.scaled(x0.reshape(m, n))
        solver = self.rescaled(gauge.known)
        product = gauge.gauged(_flat_product(op))
        rproduct = product if self.needs_symmetric else gauge.gauged(_flat_product(op.adjoint()))
        wanted = solver.size(flat_b, rproduct)
        x = torch.where(wanted.unsqueeze(-1) == 0, 0, x)  # A x = 0 has the solution 0, whatever the guess
        unit_of_residual = unit.squeeze(-1).double() * self.residual_units(gauge.known)
        tolerance = self.rtol * wanted
        if self.atol:  # units may be as small as zero
            tolerance = tolerance.clamp(min=(self.atol / unit_of_residual).to(wanted))
        max_steps = 10 * n if self.max_steps is None else self.max_steps
        with progress_bar(max_steps, type(self).__name__, self.progress) as bar:
            system = LinearSystem(
                op=op,
                product=product,
                rproduct=rproduct,
                precondition=_identity if self.preconditioner is None else gauge.preconditioner(self.preconditioner),
                b=flat_b,
                x=x,
                tolerance=tolerance,
                max_steps=max_steps,
                step=_on_step(bar, callback, units, (*batch, *op.in_shape)),
                size=gauge.known,
            )
            result = solver.iterate(system)
            residual = solver.residual(system, result.x)
            # The recursions drift from the true residual by rounding; a restart corrects this.
            for _ in range(_RESTARTS):
                if not result.may_restart(system.max_steps) or not bool((residual > tolerance).any()):
                    break
                result = solver.iterate(replace(system, x=result.x, max_steps=max_steps - result.steps)).after(result)
                residual = solver.residual(system, result.x)
        x, vanished = units.back(result.x)
        if not bool(torch.isfinite(residual).all() & torch.isfinite(x).all()):
            raise NonFiniteError(
                f"{type(self).__name__} on {op!r} met NaN or infinity: in the operator, in b, or by overflow. Check "
                "them, or use float64."
            )
        residual = torch.where(vanished, wanted, residual)  # of zero, which x has become
        converged = residual <= tolerance
        if result.stopped is not None:
            converged = converged | result.stopped
        info = SolveInfo(
            iterations=result.steps,
            residual=(residual * unit_of_residual).to(residual).reshape(batch),
            tolerance=(tolerance * unit_of_residual).to(tolerance).reshape(batch),
            converged=converged.reshape(batch),
            negative_curvature=None if result.negative is None else result.negative.reshape(batch),
            direction=None if result.direction is None else result.direction.reshape(*batch, *op.in_shape),
        )
        return Solution(x.reshape(*batch, *op.in_shape), info)

    def rescaled(self, size: float) -> Self:
        """The solver for ``A / size``, where an argument is in units of the operator."""
        return self

    def residual_units(self, size: float) -> float:
        """The unit of :meth:`residual` and ``atol`` beside that of b, for ``A / size``."""
        return 1.0

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

    def __post_init__(self) -> None:
        """Validate the arguments."""
        instance("op", self.op, LinearOperator, "a LinearOperator such as Dense(matrix)")
        instance("solver", self.solver, IterativeSolver, "an iterative solver such as CG()")

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


class _OutOfRange(Exception):
    """The products of an operator are so large or small that their squares may leave the floating range."""

    def __init__(self, size: float) -> None:
        super().__init__(size)
        self.size = size


class _Gauge:
    """Divides products by the size of the operator, which the first product that is not zero tells.

    Only extreme numbers are scaled, by powers of two: elsewhere nothing changes.

    Args:
        dtype: That of the products.
        size: The size, or None to look for it and raise :class:`_OutOfRange` if it is extreme.
    """

    def __init__(self, dtype: torch.dtype, size: float | None) -> None:
        self.known, self._looking = (1.0, True) if size is None else (size, False)
        self._low = torch.finfo(dtype).tiny ** 0.25  # products of four such numbers are still in range

    def unit(self, b: Tensor) -> Tensor:
        """Powers of two ``(m, 1)`` that bring extreme rows near one."""
        top = power_of_two(b.unsqueeze(-2)).squeeze(-1)
        return torch.where((top < self._low) | (top > 1 / self._low), top, 1)

    def gauged(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The product with ``A / size``."""

        def divided(x: Tensor) -> Tensor:
            y = product(x)
            if self._looking:
                self._look(x, y)
            return y if self.known == 1 else y / self.known

        return divided

    def preconditioner(self, op: LinearOperator) -> Callable[[Tensor], Tensor]:
        """The product with the preconditioner of ``A / size``."""
        product = _flat_product(op)
        return product if self.known == 1 else lambda x: product(x) * self.known

    def _look(self, x: Tensor, y: Tensor) -> None:
        given, got = (float(t.abs().amax()) if t.numel() else 0.0 for t in (x, y))
        if not (given > 0 and 0 < got < inf):
            return
        self._looking = False
        if not self._low < got / given < 1 / self._low:
            raise _OutOfRange(2.0 ** floor(log2(got) - log2(given)))


class _Units:
    """Changes between solutions and those of the scaled system, exactly where neither leaves the floating range."""

    def __init__(self, unit: Tensor, size: float) -> None:
        self._plain = size == 1 and bool((unit == 1).all())
        self._factor = unit.double() / size

    def scaled(self, x: Tensor) -> Tensor:
        """A guess, for the scaled system."""
        return x if self._plain else (x.double() / self._factor).to(x.dtype)

    def back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The solution ``(m, n)`` from that of the scaled system, and which rows have become zero by underflow."""
        if self._plain:
            return x, torch.zeros_like(x[:, 0] if x.shape[1] else x.sum(-1), dtype=torch.bool)
        true = (x.double() * self._factor).to(x.dtype)
        return true, (true.abs().amax(-1) < torch.finfo(x.dtype).tiny) & (x != 0).any(-1)


def _on_step(bar: tqdm, callback: Callback | None, units: _Units, shape: Shape) -> Callable[[int, Tensor], None]:
    def step(number: int, x: Tensor) -> None:
        bar.update()
        if callback is not None:
            callback(number, units.back(x)[0].reshape(shape))

    return step


def _batch_shape(x: Tensor, shape: Shape, name: str, op: LinearOperator) -> Shape:
    start = x.ndim - len(shape)
    if start < 0 or tuple(x.shape[start:]) != shape:
        raise ValueError(
            f"{name} for {op!r} has the shape (*batch, {', '.join(map(str, shape))}), not {tuple(x.shape)}."
        )
    return tuple(x.shape[:start])
