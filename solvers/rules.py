"""Powers, eigenbases and solves by structure: only a leaf reaches the solver.

Block-diagonal goes by block, Kronecker by factor, diagonal by entry, a known eigenbasis by its spectrum, a product by
its inverses in reverse. A shift is absorbed where a structure can (``Dense + lam I`` is Dense), or goes through the
eigenbases (Kronecker). What is left goes to the solver, which serves it or refuses; nothing becomes dense unasked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.direct.eigh import Eigh
from solvers.iterative.base import IterativeSolver
from solvers.operators.block_diagonal import BlockDiagonal
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal, identity
from solvers.operators.eigen import Eigen
from solvers.operators.flattened import Flattened
from solvers.operators.kronecker import Kronecker, outer
from solvers.operators.linear_operator import LinearOperator, Product, Scaled
from solvers.operators.reshape import Reshape
from solvers.operators.shifted import Shifted
from solvers.outcome.checks import checked, require, working_on
from solvers.outcome.errors import SingularMatrixError, StructureError
from solvers.precision import working_dtype
from solvers.solver import BasisSolver, Solver


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
        StructureError: If there is no rule for the structure.
        SolverError: If the numbers do not allow a right answer; each subclass says why.
    """
    if op.in_shape != op.out_shape:
        raise StructureError(f"{op!r} is not square: it has no powers. LSMR() solves least squares with rectangles.")
    if solver is None:
        from solvers.direct.auto import Auto

        solver = Auto()
    if not isinstance(solver, IterativeSolver):
        op = _widened(op)
    with checked():
        return _power(op, exponent, solver, previous, dense)


def _power(
    op: LinearOperator, exponent: float, solver: Solver, previous: LinearOperator | None, dense: bool
) -> LinearOperator:
    def part(op: LinearOperator, previous: LinearOperator | None = None) -> LinearOperator:
        return _power(op, exponent, solver, previous, dense)

    match op:
        case BlockDiagonal():
            parts = _parts(previous, BlockDiagonal, "blocks", len(op.blocks))
            blocks = []
            for index, (block, old) in enumerate(zip(op.blocks, parts, strict=True)):
                with working_on(op.block_name(index)):
                    blocks.append(part(block, old))
            return BlockDiagonal(blocks, op.places, op.size)
        case Kronecker():
            return Kronecker(*map(part, op.factors, _parts(previous, Kronecker, "factors", len(op.factors))))
        case Flattened():
            return op.wrap(part(op.op, previous.op if isinstance(previous, Flattened) else None))
        case Diagonal():
            return Diagonal(solver.spectral_power(op.values, exponent, op))
        case Eigen():
            return Eigen(op.basis, solver.spectral_power(op.values, exponent, op))
        case Scaled() if not isinstance(solver, IterativeSolver):
            return part(op.op, previous).scale(_positive(op) ** exponent)
        case Shifted(op=Scaled() as scaled) if not isinstance(solver, IterativeSolver):
            # c A + lam I = c (A + lam / c I)
            scalar = _positive(scaled)
            return part(scaled.op.shift(op.lam / scalar), previous).scale(scalar**exponent)
        case Product() if exponent == -1 and all(factor.in_shape == factor.out_shape for factor in op.factors):
            return Product(tuple(part(factor) for factor in reversed(op.factors)))
        case Shifted(op=Kronecker() as product) if isinstance(solver, BasisSolver):
            basis, products = _basis(product, solver, previous.basis if isinstance(previous, Eigen) else None)
            values = (products + op.lam).flatten(len(product.stack))
            return Eigen(basis, solver.computed_power(values, exponent, op).reshape(products.shape))
        case Shifted(op=Dense()) if isinstance(solver, IterativeSolver):
            pass  # products need no sum
        case Shifted():
            absorbed = _absorb(op)
            if not isinstance(absorbed, Shifted):
                return part(absorbed, previous)
    try:
        return _leaf_power(op, exponent, solver, previous)
    except StructureError:
        if not dense or isinstance(op, Dense):
            raise
    flat = Reshape(op.in_shape, (op.shape[0],), op.dtype, op.device)
    return flat.adjoint() @ part(Dense(op.to_dense())) @ flat


def _positive(op: Scaled) -> Tensor:
    """The scalar of a multiple, which must be positive: only then are the powers and modes of the parts those of it."""
    scalar = torch.as_tensor(op.scalar, dtype=op.dtype, device=op.device)
    require(
        (scalar > 0) & torch.isfinite(scalar),
        lambda: SingularMatrixError(f"{op!r} is no positive multiple; scale the operator before it is wrapped."),
    )
    return scalar


def _leaf_power(op: LinearOperator, exponent: float, solver: Solver, previous: LinearOperator | None) -> LinearOperator:
    if isinstance(op, Shifted) and isinstance(op.op, Kronecker) and not isinstance(op, solver.needs):
        lam = f"{float(op.lam):g}"
        raise StructureError(
            f"{type(solver).__name__} cannot invert {op.op!r} + {lam} I: the sum has no Kronecker inverse. "
            f"Use Eigh() for the exact inverse or FactoredTikhonov({lam})."
        )
    return solver.power(op, exponent, previous)


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
        StructureError: If there is no rule for the structure.
        NotSymmetricError, NonFiniteError: If the numbers do not allow it.
    """
    with checked():
        return _diagonalize(_widened(op), Eigh() if solver is None else solver, previous)


def _diagonalize(op: LinearOperator, solver: BasisSolver, previous: LinearOperator | None) -> LinearOperator:
    match op:
        case Eigen():
            return op
        case BlockDiagonal():
            parts = _parts(previous, BlockDiagonal, "blocks", len(op.blocks))
            blocks = []
            for index, (block, old) in enumerate(zip(op.blocks, parts, strict=True)):
                with working_on(op.block_name(index)):
                    blocks.append(_diagonalize(block, solver, old))
            return BlockDiagonal(blocks, op.places, op.size)
        case Scaled():
            return _diagonalize(op.op, solver, previous).scale(op.scalar)
        case Shifted():
            return _diagonalize(op.op, solver, previous).shift(op.lam)
    return Eigen(*_basis(op, solver, previous.basis if isinstance(previous, Eigen) else None))


def _basis(op: LinearOperator, solver: BasisSolver, previous: LinearOperator | None) -> tuple[LinearOperator, Tensor]:
    """Basis and eigenvalues of a matrix, a diagonal, or a Kronecker product of what has a basis."""
    match op:
        case Eigen():
            return op.basis, op.values
        case Diagonal():
            return identity(op.in_shape, op.dtype, op.device), op.values
        case Kronecker():
            parts = _parts(previous, Kronecker, "factors", len(op.factors))
            pairs = [_basis(factor, solver, part) for factor, part in zip(op.factors, parts, strict=True)]
            return Kronecker(*(basis for basis, _ in pairs)), outer(values for _, values in pairs)
        case Shifted() if not isinstance(absorbed := _absorb(op), Shifted):
            return _basis(absorbed, solver, previous)
        case Dense():
            spectrum, vectors = solver.basis(op, previous.matrix if isinstance(previous, Dense) else None)
            return Dense(vectors), spectrum
    raise StructureError(
        f"{op!r} has no eigenbasis by structure. Use solvers.eigsh(op) for some eigenpairs, or Dense(op.to_dense()) if "
        "the matrix is small."
    )


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
    if isinstance(solver, IterativeSolver):
        return solver.solve(op, b)
    inverse = power(op, -1, solver, dense=dense)
    return inverse @ b.to(inverse.dtype)


def _widened(op: LinearOperator) -> LinearOperator:
    return op if op.dtype == working_dtype(op) else op.to(working_dtype(op))


def _absorb(op: Shifted) -> LinearOperator:
    """``A + lam I`` in the structure of A where there is one, else as it is."""
    if isinstance(op.op, Dense):
        return op.op.add_diagonal(op.lam)
    return op.op.shift(op.lam)


def absorb_shift(op: Shifted) -> LinearOperator:
    """``A + lam I`` with an exact structure: as A has it, or through the eigenbases of a Kronecker product."""
    return diagonalize(op) if isinstance(op.op, Kronecker) else _absorb(op)


def _parts(previous: LinearOperator | None, kind: type, field: str, count: int) -> tuple[LinearOperator | None, ...]:
    """The parts of an earlier result, or as many None if it has another structure."""
    parts = getattr(previous, field) if isinstance(previous, kind) else ()
    return parts if len(parts) == count else (None,) * count
