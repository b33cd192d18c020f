"""Eigenvalues and singular values of any finite matrix: what LAPACK fails on is taken apart or tried again.

Divide and conquer fails, or returns NaN, on ordinary matrices with structure: rows of zeros (an embedding of which few
words occur, a bag of words), ties, low rank. Rows and columns of zeros are their own eigenvectors and are left out,
which is cheaper too. What still fails is tried in float64, and then with a perturbation of the size of the rounding
errors that the entries have anyway. Each remedy is counted (:mod:`solvers.outcome.remedies`). Errors keep their
cause: memory that runs out is an ``OutOfMemoryError`` here as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from solvers.operators.dense import Dense, non_finite, symmetric_part
from solvers.outcome.errors import SolverError
from solvers.outcome.finite import is_finite
from solvers.outcome.memory import is_out_of_memory
from solvers.outcome.remedies import FLOAT64, PERTURBED, note


def eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(*stack, n)``, ascending, and orthonormal eigenvectors ``(*stack, n, n)`` in columns.

    Args:
        matrix: Symmetric up to rounding ``(*stack, n, n)``, float32 or float64.

    Raises:
        NonFiniteError: If the matrix holds NaN or infinity.
        SolverError: If no remedy helps.
    """
    zero = _zero_rows(matrix)
    if zero is None:
        return _eigh(matrix)
    kept = (~zero).nonzero().squeeze(-1)
    return _with_zeros(zero, kept, *_eigh(matrix[..., kept[:, None], kept]))


def eigenvalues(matrix: Tensor) -> Tensor:
    """As :func:`eigendecomposition`, without the vectors, which cost most of the time; ``(*stack, n)``."""
    found = _attempt(_values, matrix)
    return found[0] if found else eigendecomposition(matrix)[0]


def singular_value_decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U ``(m, k)``, singular values ``(k,)``, descending, and V^T ``(k, n)`` of ``matrix (m, n)``.

    Leading dimensions are a stack.

    Raises:
        NonFiniteError: If the matrix holds NaN or infinity.
        SolverError: If no remedy helps.
    """
    found = _attempt(_thin, matrix)
    left, values, right = found or _remedied(_thin, matrix, "singular value decomposition", _as_it_is)
    return left, values, right


def power_of_two(matrix: Tensor) -> Tensor:
    """A power of two just below the largest entry of each matrix, ``(*stack, 1, 1)``, to divide by; one for zeros."""
    if not matrix.numel():
        return matrix.new_ones(*matrix.shape[:-2], 1, 1)
    top = matrix.abs().amax((-2, -1), keepdim=True)
    top = torch.where((top > 0) & torch.isfinite(top), top, 1)
    return top / (2 * torch.frexp(top).mantissa)


def _zero_rows(matrix: Tensor) -> Tensor | None:
    """Which rows, with their columns, are zero in every block, ``(n,)``; None if there are none."""
    if not matrix.numel():
        return None
    blocks = matrix.reshape(-1, *matrix.shape[-2:])
    candidates = (blocks.diagonal(dim1=-2, dim2=-1) == 0).all(0)
    if not bool(candidates.any()):
        return None
    filled = blocks != 0  # NaN is
    zero = candidates & ~(filled.any(-1) | filled.any(-2)).any(0)
    return zero if bool(zero.any()) else None


def _with_zeros(zero: Tensor, kept: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenpairs of a matrix from those of its part that is not zero."""
    n, k = zero.numel(), kept.numel()
    left_out = zero.nonzero().squeeze(-1)
    values = torch.cat([values, values.new_zeros(*values.shape[:-1], n - k)], -1)
    basis = values.new_zeros(*values.shape, n)
    basis[..., kept, :k] = vectors
    basis[..., left_out, torch.arange(k, n, device=zero.device)] = 1
    values, order = values.sort(dim=-1, stable=True)
    return values, basis.gather(-1, order.unsqueeze(-2).expand_as(basis))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    found = _attempt(_symmetric, matrix)
    if found is None and prod(matrix.shape[:-2]) > 1 and is_finite(matrix):
        # One bad block spoils a stack; alone, each also leaves out zeros of its own.
        parts = [eigendecomposition(part) for part in matrix.flatten(0, -3)]
        found = tuple(
            torch.stack(part).reshape(*matrix.shape[:-2], *part[0].shape) for part in zip(*parts, strict=True)
        )
    values, basis = found or _remedied(_symmetric, matrix, "eigendecomposition", symmetric_part)
    return values, basis


Routine = Callable[[Tensor], tuple[Tensor, ...]]


def _symmetric(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.eigh(matrix)


def _values(matrix: Tensor) -> tuple[Tensor, ...]:
    return (torch.linalg.eigvalsh(matrix),)


def _thin(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.svd(matrix, full_matrices=False)


def _as_it_is(matrix: Tensor) -> Tensor:
    return matrix


def _attempt(routine: Routine, matrix: Tensor) -> tuple[Tensor, ...] | None:
    """The result, or None if the routine gives up on the numbers; other errors, such as of memory, are the caller's."""
    try:
        found = routine(matrix)
    except RuntimeError as error:
        if not _gave_up(error):
            raise
        return None
    finite = bool(torch.isfinite(torch.stack([part.sum() for part in found])).all())  # as is_finite, by one wait
    return tuple(found) if finite or all(map(is_finite, found)) else None


def _gave_up(error: RuntimeError) -> bool:
    # cuSOLVER says some of its failures to converge in a plain RuntimeError, and those of memory likewise.
    text = str(error)
    numerical = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it among its exports
    return isinstance(error, numerical) or ("CUSOLVER_STATUS" in text and not is_out_of_memory(error))


def _remedied(routine: Routine, matrix: Tensor, name: str, like: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What the routine gives for the matrix in float64, or for one that differs from it by rounding.

    Args:
        routine: Gives vectors, and values in one tensor of a dimension less.
        matrix: The matrix.
        name: The decomposition, for messages.
        like: Makes a matrix, or a perturbation of it, exactly of its kind (symmetric).
    """
    if not is_finite(matrix):
        raise non_finite(Dense(matrix))
    size = power_of_two(matrix)
    for remedy, attempt in _attempts(matrix / size, like):
        found = _attempt(routine, attempt)
        if found is not None:
            note(remedy)
            scale = size.to(attempt).squeeze(-1)
            return tuple((part if part.ndim == matrix.ndim else part * scale).to(matrix) for part in found)
    raise SolverError(
        f"The {name} of {Dense(matrix)!r} did not converge: not in {matrix.dtype}, not in float64, and not with a "
        "perturbation of the size of its rounding errors. All its entries are finite. Add damping before it is "
        "decomposed."
    )


def _attempts(matrix: Tensor, like: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The matrix (largest entry near one) in float64, and with more and more noise."""
    wide = like((matrix.cpu() if matrix.device.type == "mps" else matrix).double())  # MPS has no float64
    yield FLOAT64, wide
    generator = torch.Generator(wide.device).manual_seed(0)
    noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
    n = max(*wide.shape[-2:], 1)
    for relative in (1.0, 10.0, float(n)):  # of n^-1/2 noise, whose spectral norm is about two
        yield PERTURBED, wide + relative * torch.finfo(matrix.dtype).eps * like(noise) / n**0.5
