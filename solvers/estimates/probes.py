"""Random vectors, products with them, and the requirements of estimators on an operator.

Vectors are rows: m vectors of an operator with n unknowns are ``(m, n)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.operators.decompositions import power_of_two
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import instance, whole
from solvers.outcome.errors import NotSymmetricError
from solvers.precision import working_dtype

FlatProduct = Callable[[Tensor], Tensor]
"""Maps rows ``(m, n)`` to rows ``(m, n')``."""

# Numbers in one block of vectors, where the user sets no batch_size: 256 MiB in float64.
_BLOCK = 1 << 25

# The squares of float64 numbers within this and its inverse are in range, and have all their digits.
_SMALL = 1e-140


def own_generator(op: LinearOperator, generator: torch.Generator | None) -> torch.Generator:
    """The user's generator, or a new one seeded 0; torch's global random state is never used."""
    instance("generator", generator, torch.Generator, "a torch.Generator", optional=True)
    return torch.Generator(op.device).manual_seed(0) if generator is None else generator


def signs(op: LinearOperator, count: int, generator: torch.Generator) -> Tensor:
    """Rademacher vectors ``(count, n)``: entries 1 and -1 with equal probability."""
    n = count * op.shape[1]
    # Eight signs from each draw, one from the topmost bit of each byte: drawing is most of the cost.
    draws = torch.empty(-(-n // 8), dtype=torch.int64, device=generator.device).random_(
        -(2**63), None, generator=generator
    )
    bits = draws.view(torch.int8)[:n].bitwise_right_shift_(7).bitwise_or_(1)  # 0 | 1 or -1 | 1
    return bits.to(op.device, working_dtype(op)).reshape(count, op.shape[1])


def normals(op: LinearOperator, count: int, generator: torch.Generator) -> Tensor:
    """Gaussian vectors ``(count, n)``."""
    size = (count, op.shape[1])
    return torch.randn(size, generator=generator, device=generator.device, dtype=working_dtype(op)).to(op.device)


def flat_product(op: LinearOperator, batch: int | None = None) -> FlatProduct:
    """Products with rows ``(m, n)``, in the working dtype, at most ``batch`` rows at a time."""
    rows, columns = op.shape

    def product(x: Tensor) -> Tensor:
        # Functions may differentiate inside, so gradients stay enabled and their traces are cut here.
        y = op @ x.to(op.dtype).reshape(x.shape[0], *op.in_shape)
        return y.detach().reshape(x.shape[0], rows).to(x.dtype)

    def in_batches(x: Tensor) -> Tensor:
        assert x.shape[1] == columns
        if batch is None or x.shape[0] <= batch:
            return product(x)
        return torch.cat([product(part) for part in x.split(batch)])

    return in_batches


def default_batch(op: LinearOperator, batch_size: int | None) -> int:
    """How many vectors to multiply at once.

    Raises:
        ValueError: If the user's number is not positive.
    """
    whole("batch_size", batch_size, optional=True)
    if batch_size is not None:
        return batch_size
    fits = max(1, _BLOCK // max(1, *op.shape))
    return fits if op.block_size is None else min(fits, op.block_size)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row; summed in float64, which holds the squares of float32 numbers.

    Returns:
        ``(m,)``, float64.
    """
    size = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    if x.dtype == torch.float64 and bool(((size < _SMALL) | ~(size < 1 / _SMALL)).any()):
        unit = power_of_two(x.unsqueeze(-2)).squeeze(-1)
        return torch.linalg.vector_norm(x / unit, dim=-1) * unit.squeeze(-1)
    return size


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal rows that span those of ``x (m, n)``, m <= n; the same whatever the scale of x."""
    size = x.abs().amax() if x.numel() else x.new_ones(())
    return torch.linalg.qr((x / torch.where(size > 0, size, 1)).mT).Q.mT


def require_operator(op: LinearOperator) -> None:
    """Refuse what is no operator.

    Raises:
        TypeError: If it is none.
    """
    instance("op", op, LinearOperator, "a LinearOperator such as Dense(matrix)")


def require_square(op: LinearOperator, name: str) -> None:
    """Refuse a rectangle.

    Raises:
        ValueError: If the operator is not square.
    """
    require_operator(op)
    if op.in_shape != op.out_shape:
        raise ValueError(
            f"{name} needs a square operator, and {op!r} goes from {op.in_shape} to {op.out_shape}. "
            "op.adjoint() @ op is square; solvers.svds takes rectangles."
        )


def require_symmetric(op: LinearOperator, name: str) -> None:
    """Refuse an operator that is not known to be symmetric.

    Raises:
        ValueError: If the operator is not square.
        NotSymmetricError: If it is not known to be symmetric.
    """
    require_square(op, name)
    if not op.symmetric:
        raise NotSymmetricError(
            f"{name} needs a symmetric operator, and {op!r} is not known to be one. Say symmetric=True where it is a "
            "Function; solvers.svds takes any operator."
        )
