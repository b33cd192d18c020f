"""Powers, eigenbases and solves by structure: only a leaf reaches the solver. One rule per operator class.

Block-diagonal goes by block, Kronecker by factor, diagonal by entry, a known eigenbasis by its spectrum, a product by
its inverses in reverse. A shift is absorbed where a structure can (``Dense + lam I`` is Dense), or goes through the
eigenbases (Kronecker). The solver serves or refuses the rest; a matrix becomes dense only on request.
An operator class from outside joins by :func:`~solvers.rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from solvers.direct.auto import Auto
from solvers.direct.cholesky import Cholesky
from solvers.direct.eigh import Eigh
from solvers.iterative.base import IterativeSolver
from solvers.operators.block_diagonal import BlockDiagonal
from solvers.operators.compositions import Product, Scaled, Shifted
from solvers.operators.damping import Tikhonov
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal, identity
from solvers.operators.dispatch import advice, open_to_rules, rule, rules_of
from solvers.operators.eigen import Eigen
from solvers.operators.flattened import Flattened
from solvers.operators.kronecker import Kronecker, outer
from solvers.operators.linear_operator import DampingLike, LinearOperator, Scalar, SolverLike, answers
from solvers.operators.reshape import Reshape
from solvers.outcome.arguments import flag, instance, number
from solvers.outcome.checks import checked, require, working_on
from solvers.outcome.errors import SingularMatrixError, StructureError
from solvers.precision import full_float32, without_autocast, working_dtype
from solvers.solver import BasisSolver, Solver


@without_autocast
def power(
    op: LinearOperator,
    exponent: float,
    solver: Solver | None = None,
    previous: LinearOperator | None = None,
    *,
    dense: bool = False,
) -> LinearOperator:
    """``op ** exponent``, keeping the structure of ``op``.

    >>> from solvers import Kronecker
    >>> op = Kronecker(4 * torch.eye(2), 9 * torch.eye(3))
    >>> power(op, -0.5)
    Kronecker(2x2, 3x3)
    >>> power(op, -0.5) @ torch.ones(2, 3) * 6
    tensor([[1., 1., 1.],
            [1., 1., 1.]])

    Args:
        op: Square operator; symmetric unless the exponent is -1 and the solver takes others.
        exponent: Any real number that the solver serves.
        solver: What to do with the leaves; by default :class:`~solvers.Auto`, the exact solver that fits each.
        previous: An earlier result for a nearby operator of the same structure, for warm starts.
        dense: True to form the dense matrix of a leaf that the solver does not serve, instead of refusing.

    Returns:
        Operator of the same shapes. Half precision is answered in float32.

    Raises:
        StructureError: If the structure has no rule.
        SolverError: If the numbers do not allow a right answer; each subclass says why.
    """
    _check_operator("op", op)
    number("exponent", exponent)
    instance("solver", solver, Solver, "a solvers.Solver such as Cholesky()", optional=True)
    _check_operator("previous", previous, optional=True)
    flag("dense", dense)
    if op.in_shape != op.out_shape:
        raise StructureError(f"{op!r} is not square: it has no powers. LSMR() solves least squares with rectangles.")
    task = PowerTask(exponent, Auto() if solver is None else solver, previous, dense)
    if task.by_products:  # they may be those of a model, whose precision is the user's
        with checked():
            return _power(op, task)
    with checked(), full_float32:
        return _power(_widened(op), task)


@dataclass(frozen=True)
class PowerTask:
    """Argument of a rule of :func:`power`, beside the operator.

    Attributes:
        exponent: The exponent.
        solver: Serves the leaves; its ``spectral_power`` raises eigenvalues that are known.
        previous: An earlier result for a nearby operator, or None.
        dense: Whether the matrix of a leaf that the solver does not serve may be formed.
    """

    exponent: float
    solver: Solver
    previous: LinearOperator | None = None
    dense: bool = False

    @property
    def by_products(self) -> bool:
        """Whether the solver needs products only, and so takes sums and multiples as they are."""
        return isinstance(self.solver, IterativeSolver)

    def of(self, op: LinearOperator, previous: LinearOperator | None = None) -> LinearOperator:
        """The power of a part, by the rule for its class."""
        return _power(op, replace(self, previous=previous))

    def leaf(self, op: LinearOperator) -> LinearOperator:
        """The power by the solver itself, or of the dense matrix where it may be formed."""
        try:
            return self.solver.power(op, self.exponent, self.previous)
        except StructureError:
            if not self.dense or isinstance(op, Dense):
                raise
        flat = Reshape(op.in_shape, (op.shape[0],), op.dtype, op.device)
        return flat.adjoint() @ self.of(Dense(op.to_dense())) @ flat


@rules_of(power)
def _power(op: LinearOperator, task: PowerTask) -> LinearOperator:
    return task.leaf(op)


@rule(power, BlockDiagonal)
def _power_of_blocks(op: BlockDiagonal, task: PowerTask) -> BlockDiagonal:
    return _by_block(op, task.of, task.previous)


@rule(power, Kronecker)
def _power_of_factors(op: Kronecker, task: PowerTask) -> Kronecker:
    return Kronecker(*map(task.of, op.factors, _parts(task.previous, Kronecker, "factors", len(op.factors))))


@rule(power, Flattened)
def _power_of_flattened(op: Flattened, task: PowerTask) -> Flattened:
    return op.wrap(task.of(op.op, task.previous.op if isinstance(task.previous, Flattened) else None))


@rule(power, Diagonal)
def _power_of_entries(op: Diagonal, task: PowerTask) -> Diagonal:
    return Diagonal(task.solver.spectral_power(op.values, task.exponent, op))


@rule(power, Eigen)
def _power_of_spectrum(op: Eigen, task: PowerTask) -> Eigen:
    return Eigen(op.basis, task.solver.spectral_power(op.values, task.exponent, op))


@rule(power, Scaled)
def _power_of_multiple(op: Scaled, task: PowerTask) -> LinearOperator:
    if task.by_products:
        return task.leaf(op)
    return task.of(op.op, task.previous).scale(_positive(op) ** task.exponent)


@rule(power, Product)
def _power_of_product(op: Product, task: PowerTask) -> LinearOperator:
    if task.exponent != -1 or any(factor.in_shape != factor.out_shape for factor in op.factors):
        return task.leaf(op)
    return Product(tuple(task.of(factor) for factor in reversed(op.factors)))


@rule(power, Shifted)
def _power_of_shifted(op: Shifted, task: PowerTask) -> LinearOperator:
    return shifted_power(op.op, op, task)


@open_to_rules
def shifted_power(inner: LinearOperator, op: Shifted, task: PowerTask) -> LinearOperator:
    """``op ** task.exponent`` of ``op = inner + lam I``: the power of what absorbs the shift, else a leaf."""
    absorbed = inner.absorb_shift(op.lam)
    return task.leaf(op) if isinstance(absorbed, Shifted) else task.of(absorbed, task.previous)


@rule(shifted_power, Dense)
def _power_of_shifted_matrix(inner: Dense, op: Shifted, task: PowerTask) -> LinearOperator:
    adds = type(task.solver) is Cholesky  # the shift on its way, without a copy of the matrix
    return task.leaf(op) if task.by_products or adds else task.of(inner.absorb_shift(op.lam), task.previous)


@rule(shifted_power, Scaled)
def _power_of_shifted_multiple(inner: Scaled, op: Shifted, task: PowerTask) -> LinearOperator:
    if task.by_products:
        return task.leaf(op)
    scalar = _positive(inner)  # c A + lam I = c (A + lam / c I)
    return task.of(inner.op.shift(op.lam / scalar), task.previous).scale(scalar**task.exponent)


@rule(shifted_power, Kronecker)
def _power_of_shifted_factors(inner: Kronecker, op: Shifted, task: PowerTask) -> LinearOperator:
    if isinstance(task.solver, BasisSolver):
        eigen = _bases(inner, BasisTask(task.solver, _basis_of(task.previous)))
        values = (eigen.values + op.lam).flatten(len(inner.stack))
        return Eigen(eigen.basis, task.solver.computed_power(values, task.exponent, op).reshape(eigen.values.shape))
    absorbed = inner.absorb_shift(op.lam)
    if not isinstance(absorbed, Shifted):
        return task.of(absorbed, task.previous)
    if not (task.dense or isinstance(op, task.solver.needs)):
        lam = f"{float(op.lam):g}"
        raise StructureError(
            f"{type(task.solver).__name__} cannot invert {inner!r} + {lam} I: the sum has no Kronecker inverse. "
            f"Use Eigh() for the exact inverse or FactoredTikhonov({lam})."
        )
    return task.leaf(op)


def _positive(op: Scaled) -> Tensor:
    """The scalar of a multiple, which must be positive so that powers and modes carry over to the parts."""
    scalar = torch.as_tensor(op.scalar, dtype=op.dtype, device=op.device)
    require(
        (scalar > 0) & torch.isfinite(scalar),
        lambda: SingularMatrixError(f"{op!r} is no positive multiple; scale the operator before it is wrapped."),
    )
    return scalar


@answers("bases")
def diagonalize(
    op: LinearOperator, solver: BasisSolver | None = None, previous: LinearOperator | None = None
) -> LinearOperator:
    """The operator by its eigenvalues and eigenvectors.

    Args:
        op: Symmetric operator made of Dense, Diagonal, Kronecker, Eigen, multiples, shifts and blocks of these.
        solver: Finds the bases of the matrices; by default :class:`~solvers.Eigh`.
        previous: An earlier result for a nearby operator; :class:`~solvers.Subspace` starts from its basis.

    Returns:
        An :class:`~solvers.Eigen` (for block-diagonal operators: a BlockDiagonal of them). Factors of a Kronecker
        product keep their own basis, in the order of the factors; eigenvalues ascend within a matrix.

    Raises:
        StructureError: If the structure has no rule.
        NotSymmetricError, NonFiniteError: If the numbers do not allow it.
    """
    _check_operator("op", op)
    instance("solver", solver, BasisSolver, "a solver that finds bases, such as Eigh()", optional=True)
    _check_operator("previous", previous, optional=True)
    with checked(), full_float32:
        return _diagonalize(_widened(op), BasisTask(Eigh() if solver is None else solver, _basis_of(previous)))


@dataclass(frozen=True)
class BasisTask:
    """Argument of a rule of :func:`diagonalize`, beside the operator.

    Attributes:
        solver: Finds the bases of matrices.
        previous: The basis found earlier for a nearby operator (for blocks, the earlier result), or None.
    """

    solver: BasisSolver
    previous: LinearOperator | None = None

    def of(self, op: LinearOperator, previous: LinearOperator | None = None) -> LinearOperator:
        """The eigenvalues and eigenvectors of a part, by the rule for its class; ``previous`` is an earlier result."""
        return _diagonalize(op, replace(self, previous=_basis_of(previous)))


@rules_of(diagonalize)
def _diagonalize(op: LinearOperator, task: BasisTask) -> LinearOperator:
    raise StructureError(
        f"{op!r} has no eigenbasis by structure. Use solvers.eigsh(op) for some eigenpairs, or Dense(op.to_dense()) if "
        f"the matrix is small.{advice('diagonalize', op)}"
    )


@rule(diagonalize, BlockDiagonal)
def _eigen_of_blocks(op: BlockDiagonal, task: BasisTask) -> BlockDiagonal:
    return _by_block(op, task.of, task.previous)


@rule(diagonalize, Scaled)
def _eigen_of_multiple(op: Scaled, task: BasisTask) -> LinearOperator:
    return _diagonalize(op.op, task).scale(op.scalar)


@rule(diagonalize, Shifted)
def _eigen_of_shifted(op: Shifted, task: BasisTask) -> LinearOperator:
    return _diagonalize(op.op, task).shift(op.lam)


@rule(diagonalize, Eigen)
def _eigen_of_eigen(op: Eigen, task: BasisTask) -> Eigen:
    return op


@rule(diagonalize, Diagonal)
def _eigen_of_diagonal(op: Diagonal, task: BasisTask) -> Eigen:
    return Eigen(identity(op.in_shape, op.dtype, op.device), op.values)


@rule(diagonalize, Dense)
def _eigen_of_matrix(op: Dense, task: BasisTask) -> Eigen:
    values, vectors = task.solver.basis(op, task.previous.matrix if isinstance(task.previous, Dense) else None)
    return Eigen(Dense(vectors), values)


@rule(diagonalize, Kronecker)
def _bases(op: Kronecker, task: BasisTask) -> Eigen:
    parts = _parts(task.previous, Kronecker, "factors", len(op.factors))
    eigens = [_eigen_of_factor(f, replace(task, previous=part)) for f, part in zip(op.factors, parts, strict=True)]
    return Eigen(Kronecker(*(eigen.basis for eigen in eigens)), outer(eigen.values for eigen in eigens))


def _eigen_of_factor(factor: LinearOperator, task: BasisTask) -> Eigen:
    eigen = _diagonalize(factor.op.absorb_shift(factor.lam) if isinstance(factor, Shifted) else factor, task)
    if not isinstance(eigen, Eigen):
        raise StructureError(f"{factor!r} has no eigenbasis as a whole, which a factor of a Kronecker product needs.")
    return eigen


@answers("inverse")
def _inverse(
    op: LinearOperator, damping: Scalar | DampingLike, solver: SolverLike | None, dense: bool
) -> LinearOperator:
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver is a solvers.Solver such as Cholesky(), not {solver!r}.")
    damped = damping(op) if callable(damping) else Tikhonov(damping)(op)
    return power(damped, -1, solver, dense=dense)


@without_autocast
def solve(op: LinearOperator, b: Tensor, solver: Solver | None = None, *, dense: bool = False) -> Tensor:
    """``op ** -1 @ b`` for right-hand sides ``b (*batch, *out_shape)``; least squares for a rectangle and LSMR.

    The answer has the precision of :func:`power`'s.

    Factorises once per call; keep ``op.inverse(solver=...)`` to solve again with the same operator. An iterative solver
    runs on the operator as a whole.

    Args:
        op: Square operator, or a rectangle.
        b: Right-hand sides.
        solver: As for :func:`power`.
        dense: As for :func:`power`.

    Raises:
        SolverError: As :func:`power`.
    """
    _check_operator("op", op)
    instance("b", b, Tensor, "a tensor")
    if isinstance(solver, IterativeSolver):
        return solver.solve(op, b)
    inverse = power(op, -1, solver, dense=dense)
    return inverse @ b.to(inverse.dtype)


def _check_operator(name: str, op: Any, optional: bool = False) -> None:
    instance(name, op, LinearOperator, "a LinearOperator such as Dense(matrix)", optional=optional)


def _widened(op: LinearOperator) -> LinearOperator:
    return op if op.dtype == working_dtype(op) else op.to(working_dtype(op))


def _basis_of(previous: LinearOperator | None) -> LinearOperator | None:
    """The basis of an earlier result; blocks are returned as they are, for use one by one."""
    return previous.basis if isinstance(previous, Eigen) else previous if isinstance(previous, BlockDiagonal) else None


def _by_block(
    op: BlockDiagonal,
    function: Callable[[LinearOperator, LinearOperator | None], LinearOperator],
    previous: LinearOperator | None,
) -> BlockDiagonal:
    """The block-diagonal operator of ``function(block, earlier block)``; errors name the block."""
    blocks = []
    for index, (block, old) in enumerate(
        zip(op.blocks, _parts(previous, BlockDiagonal, "blocks", len(op.blocks)), strict=True)
    ):
        with working_on(op.block_name(index)):
            blocks.append(function(block, old))
    return BlockDiagonal(blocks, op.places, op.size)


def _parts(previous: LinearOperator | None, kind: type, field: str, count: int) -> tuple[LinearOperator | None, ...]:
    """The parts of an earlier result, or as many None if it has another structure."""
    parts = getattr(previous, field) if isinstance(previous, kind) else ()
    return parts if len(parts) == count else (None,) * count
