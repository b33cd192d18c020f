"""The chain of one block: estimate, damp, invert, apply."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from curvature import CurvatureEstimator
from curvature.structures.estimator import Form
from curvature.structures.inverse import InverseEstimator
from precond.layerwise.blocks.refresh import refresh_cost
from precond.step.divergence import TOLERATED_FAILURES
from solvers import (
    Cholesky,
    CholeskyInverse,
    Damping,
    Diagonal,
    Eigen,
    Eigh,
    Kronecker,
    LinearOperator,
    Solver,
    from_state,
    power,
    state,
)

log = logging.getLogger(__name__)


class Preconditioner:
    """``P = (damped C)^exponent`` of one block, refreshed periodically.

    If a refresh fails (a factor that is not positive definite, say) the last good inverse stays, the failure is
    counted, and after three in a row an error names the block (:meth:`failed`).

    Args:
        estimator: Estimate of C.
        solver: Inverts or roots.
        exponent: -1 for the inverse.
    """

    def __init__(self, estimator: CurvatureEstimator, solver: Solver, exponent: float = -1.0) -> None:
        self.estimator, self.solver, self.exponent = estimator, solver, exponent
        self.form: Form = "outer"  # how samples reach the estimate
        self.inverse: LinearOperator | None = None
        self.elsewhere: int | None = None  # cost of a refresh, where another process has the inverse
        self.unseen = 0  # updates that the inverse does not include yet
        self.failures = 0
        self._priced: tuple[LinearOperator | None, int] = None, 0  # the present inverse and its cost, once asked for

    @property
    def absent(self) -> bool:
        """Whether no process has an inverse yet."""
        return self.inverse is None and self.elsewhere is None

    @property
    def cost(self) -> int | None:
        """Cost of a refresh; ``None`` before the first one."""
        if self.inverse is None:
            return self.elsewhere
        if self._priced[0] is not self.inverse:  # asked for in every step
            self._priced = self.inverse, refresh_cost(self.inverse)
        return self._priced[1]

    @property
    def changes_estimate(self) -> bool:
        """Whether the coming step may refresh P and with it the estimate: its basis, or the inverse that it is."""
        if not self.unseen and self.inverse is not None:
            return False
        keeps = type(self.estimator).refresh_basis is CurvatureEstimator.refresh_basis
        return not keeps or isinstance(self.estimator, InverseEstimator)

    def mark(self, estimate: bool = True) -> Any:
        """Inverse and, unless it stays the same, estimate as they are now, for :meth:`back_to`."""
        return self.estimator.mark() if estimate else None, dict(vars(self))

    def back_to(self, mark: Any) -> None:
        """Undo what has changed since a mark."""
        estimate, own = mark
        vars(self).clear()
        vars(self).update(own)
        if estimate is not None:
            self.estimator.back_to(estimate)

    def commit(self, ema: float) -> None:
        """Fold the statistics of the step into the estimate."""
        self.estimator.commit(ema)
        self.unseen += 1

    @property
    def fails_late(self) -> bool:
        """Whether a refresh may go on before its checks are read: nothing in it answers them."""
        return type(self.solver) in (Cholesky, Eigh)

    def attempt(self, damping: Damping, *, basis: bool = True, applications: int | None = None) -> bool:
        """:meth:`refresh`; whether there is a new P."""
        return self.refresh(damping, basis=basis, applications=applications)[0]

    def refresh(
        self, damping: Damping, *, basis: bool = True, rows: int | None = None, applications: int | None = None
    ) -> tuple[bool, LinearOperator | None]:
        """Recompute P from the current estimate.

        Args:
            damping: How to damp.
            rows: Vectors each factor is applied to in one application, where the gradient is given by its rows.
            applications: How often P will be applied before the next refresh; decides between explicit inverses and
                triangular solves.
            basis: Whether costly decompositions may be redone; without, only estimates that are already diagonal in a
                known basis are inverted again, entry by entry.

        Returns:
            Whether there is a new P, and its :meth:`metric`, where the damped C is kept.

        Raises:
            SolverError: If that fails, see :meth:`failed`.
        """
        if not self.estimator.ready:
            return False, None
        if basis and (self.inverse is not None or self.unseen > 1):  # the first update finds its own basis
            self.estimator.refresh_basis()
        if isinstance(self.estimator, InverseEstimator):
            if damping.relative:
                raise ValueError(
                    f"block {self.estimator.block.name} learns its inverse and keeps no C: give a damping in units "
                    f"of C, such as Tikhonov(1e-3), not {damping!r}."
                )
            self.estimator.improve(float(damping.strength))
            self.take(self.estimator.operator())
            return True, None
        operator = self.estimator.operator()
        if not basis and self.inverse is not None and not isinstance(operator, (Eigen, Diagonal)):
            return False, None
        reads_once = type(self.solver) is Cholesky and self.solver.explicit and applications and self.exponent == -1
        damped = damping.deferred(operator) if reads_once else damping(operator)
        inverse, metric = self.power_of(damped, rows, applications)
        self.take(inverse, basis=basis)
        return True, metric if self.keeps_curvature else None

    def take(self, inverse: LinearOperator, *, basis: bool = True) -> None:
        """Replace P by a new one, after the whole decomposition or, without ``basis``, in the basis that is known."""
        self.inverse, self.failures = inverse, 0
        self.unseen = 0 if basis else self.unseen
        self._priced = None, 0  # which would hold the one before until somebody asks

    def failed(self, error: Exception) -> None:
        """Count a refresh that failed; the last inverse stays.

        Raises:
            SolverError: If there is none, or too many fail in a row.
        """
        self.failures += 1
        if self.absent or self.failures > TOLERATED_FAILURES:
            raise type(error)(
                f"block {self.estimator.block.name}: no inverse ({self.failures} failures in a row). {error}"
            ) from error
        log.warning("block %s keeps its last inverse: %s", self.estimator.block.name, error)

    def power_of(
        self, damped: LinearOperator, rows: int | None, applications: int | None, *, in_stack: bool = False
    ) -> tuple[LinearOperator, LinearOperator]:
        """P, by triangular factors where they are applied too rarely for an explicit inverse to pay; and its metric.

        Args:
            damped: The damped C.
            rows: See :meth:`refresh`.
            applications: See :meth:`refresh`.
            in_stack: Whether C is that of this block and others like it, ``(k, ...)``; so are the results then.
        """
        pair = isinstance(damped, Kronecker) and len(damped.stack) == in_stack and len(damped.factors) == 2
        if not (pair and isinstance(self.solver, Cholesky) and self.solver.explicit and applications):
            previous = None if in_stack else self.inverse
            return power(damped, self.exponent, self.solver, previous=previous), damped
        assert isinstance(damped, Kronecker)
        halves = [power(factor, self.exponent, replace(self.solver, explicit=False)) for factor in damped.factors]
        sizes = damped.in_shape[-2:]
        factors = []
        for half, size, other in zip(halves, sizes, reversed(sizes), strict=True):
            columns = applications * (other if rows is None else rows)
            # An inverse costs (2/3) n^3 slow operations; a triangular solve about twice its product, per column.
            factors.append(half.to_explicit() if isinstance(half, CholeskyInverse) and 2 * columns > size else half)
        root = Kronecker(*halves)
        return Kronecker(*factors), damped if triangles_of(root) is None else root

    def __matmul__(self, gradient: Tensor) -> Tensor:
        """``P g`` for a gradient in block form, computed in the precision of P."""
        if self.inverse is None:
            return gradient
        dtype, own = self.inverse.dtype, gradient.dtype  # a conversion that does nothing costs as much as a product
        result = self.inverse @ (gradient if own == dtype else gradient.to(dtype))
        return result if result.dtype == own else result.to(own)

    @property
    def keeps_curvature(self) -> bool:
        """Whether P is the inverse of a damped C that is kept."""
        return self.exponent == -1 and not isinstance(self.estimator, InverseEstimator)

    def metric(self, damping: Damping) -> LinearOperator | None:
        """The damped C whose inverse P is, or that inverse where it is kept as triangles; ``None`` where there is none.

        Triangles measure a vector by half the products, see :func:`triangles_of`.
        """
        if self.inverse is None or not self.keeps_curvature:
            return None
        return damping(self.estimator.operator()) if triangles_of(self.inverse) is None else self.inverse

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers: the estimate and the inverse, which a refresh at load time could not reproduce."""
        out: dict[str, Any] = {
            "estimate": self.estimator.state_dict(),
            "failures": self.failures,
            "unseen": self.unseen,
        }
        if self.inverse is not None:
            out["inverse"] = state(self.inverse)
        return out

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.estimator.load_state_dict(saved["estimate"])
        self.failures = int(saved["failures"])
        self.unseen = int(saved.get("unseen", 0))
        self.inverse = from_state(saved["inverse"]) if "inverse" in saved else None


def triangles_of(inverse: LinearOperator) -> tuple[CholeskyInverse, CholeskyInverse] | None:
    r"""The factors of :math:`(L_B L_B^\top)^{-1} \otimes (L_A L_A^\top)^{-1}` where both are kept as triangles."""
    match inverse:
        case Kronecker(factors=(CholeskyInverse() as left, CholeskyInverse() as right)):
            return left, right
    return None
