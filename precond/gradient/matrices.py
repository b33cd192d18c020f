"""Gradients as tensors with one matrix per axis: merging, blocking, Gram matrices, bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod

import torch
from torch import Tensor

from solvers import Dense, Eigh, Subspace
from solvers.operators.decompositions import singular_value_decomposition
from solvers.triangles import add_gram, gram


def merged_shape(shape: tuple[int, ...], limit: int | None) -> tuple[int, ...]:
    """Shape after dropping axes of size one and joining neighbours, from the last, while their product stays small.

    The first axis, which counts outputs, is never joined, so that a matrix stays one.

    Args:
        shape: Shape of a parameter.
        limit: Largest size of a joined axis; ``None`` keeps the shape as it is.

    Returns:
        At least one axis: ``(1,)`` for one number.

    Example:
        >>> merged_shape((64, 3, 3, 3), 64), merged_shape((8, 1, 4), 32), merged_shape((), 8)
        ((64, 27), (8, 4), (1,))
    """
    if limit is None:
        return tuple(shape)
    sizes = [size for size in shape if size != 1]
    merged: list[int] = []
    for size in reversed(sizes[1:]):
        if merged and merged[0] * size <= limit:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return (*sizes[:1], *merged) or (1,)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows (first axis) and columns (all others) of a parameter seen as one matrix."""
    return shape[0], prod(shape[1:])


def blocks(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    """Regions of at most ``size`` along each axis that tile a shape, in row-major order."""
    return product(*(tuple(slice(start, min(start + size, n)) for start in range(0, n, size)) for n in shape))


def worth_a_matrix(n: int, numel: int, max_dim: int, max_ratio: float | None) -> bool:
    """Whether an axis of n entries, of a tensor of ``numel`` numbers, is to have a matrix ``(n, n)``.

    The matrix of an axis that is far longer than all others together has more numbers than the tensor, and learns
    little from them: the rows of an embedding, most of which have no gradient in a batch, or the inputs of a small
    head. Tensors of less than 256 numbers count as 256, because small matrices cost nothing.

    Args:
        n: Size of the axis.
        numel: Numbers in the tensor.
        max_dim: Longest axis with a matrix.
        max_ratio: Largest ratio of n to the size of all other axes together, ``n * n / numel``; ``None`` for any.

    >>> [worth_a_matrix(n, n * others, 8192, 4.0) for n, others in ((32, 1), (3072, 768), (2000, 16), (50_000, 768))]
    [True, True, False, False]
    """
    return n <= max_dim and (max_ratio is None or n * n <= max_ratio * max(numel, 256))


def unfolded(x: Tensor, axis: int) -> Tensor:
    """Each tensor of a stack ``(k, *shape)`` as a matrix ``(n_axis, all others)``, ``(k, n_axis, m)``."""
    if x.ndim == 3:
        return x if axis == 0 else x.mT
    return x.movedim(axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)


def axis_gram(x: Tensor, axis: int) -> Tensor:
    r""":math:`X_{(a)} X_{(a)}^\top` of the unfoldings along an axis, ``(k, n_a, n_a)`` for a stack ``(k, *shape)``."""
    return gram(unfolded(x, axis).mT)


def add_axis_gram(factor: Tensor, x: Tensor, axis: int, *, old: float, new: float) -> None:
    r""":math:`F \leftarrow old \cdot F + new \cdot X_{(a)} X_{(a)}^\top` for a stack, in place and in one pass."""
    add_gram(factor, unfolded(x, axis).mT, old=old, new=new)


def multiply(x: Tensor, matrices: Mapping[int, Tensor], *, transpose: bool = False) -> Tensor:
    """Apply matrices (or their transposes) along each axis that has them, to a stack ``(k, *shape)``.

    Args:
        x: The stack.
        matrices: Axis of ``shape`` -> ``(k, n_axis, n_axis)``.
        transpose: Apply the transposes.
    """
    for axis, matrix in matrices.items():
        if x.ndim == 3 and axis == 1:
            x = torch.bmm(x, matrix if transpose else matrix.mT)
            continue
        matrix = matrix.mT if transpose else matrix
        if x.ndim == 3:
            x = torch.bmm(matrix, x)
        else:
            moved = x.movedim(axis + 1, 1)
            x = torch.bmm(matrix, moved.reshape(*matrix.shape[:2], -1)).reshape(moved.shape).movedim(1, axis + 1)
    return x


def along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Numbers ``(k, n_axis)`` as factors of a stack ``(k, *shape)`` with ``ndim`` axes in its shape."""
    return values.reshape([len(values)] + [-1 if k == axis else 1 for k in range(ndim)])


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors in columns, of sums of Gram matrices.

    Raises:
        SolverError: If the decomposition fails; see :meth:`solvers.Eigh.basis`.
    """
    return Eigh().basis(Dense(matrix, is_gram=True))


#: Eigenvalues below this fraction of the numbers that they are computed from belong to the null space, whose vectors
#: rounding errors mix: at 1e-6 SPlus, which takes signs in the basis, still parts from itself where a sum has another
#: order.
_NULL = 1e-5


def eigenbasis(matrix: Tensor) -> Tensor:
    r"""Orthonormal eigenvectors, by ascending eigenvalue, of sums of Gram matrices, those of the null space chosen.

    A gradient has a low rank, and any basis of the null space of its Gram matrix serves; but which one rounding errors
    choose, and later gradients have parts there: two runs would go apart that differ in the order of a sum, as those on
    another number of processes do. With the columns of N a basis of the null space, and the same matrix
    :math:`\Omega` every time, it is replaced by :math:`N U` for :math:`N^\top \Omega = U R` with a positive diagonal
    of R, the same for every N. Rows of zeros stay apart: their unit vectors are members of it.

    What is null is measured by the numbers that an eigenvalue is computed from, which are those of all only at first.
    In a raw table columns have scales of their own, and the numbers in :math:`N^\top A N` are as small as those of the
    small columns; its eigenvectors are resolved as those of A are, and so on. With r the lengths of the rows of N, the
    numbers are :math:`s = r^\top |A|\, r`, whatever basis N is. Where large columns depend on one another, which makes
    a large s, small ones stay mixed with what they have in common.

    Raises:
        SolverError: If the decomposition fails.
    """
    values, basis = spectrum(matrix)
    n = matrix.shape[-1]
    share = max(2 * n**0.5 * torch.finfo(values.dtype).eps, _NULL)
    null = values <= share * values[..., -1:].clamp(min=0)
    unused = matrix.diagonal(dim1=-2, dim2=-1) == 0
    # A routine for stacks may leave parts of used rows in the vectors of unused ones: as many stay null regardless.
    stays = torch.arange(n, device=null.device) < unused.sum(-1, keepdim=True)
    resolved_more = True
    while resolved_more:
        count = int(null.sum(-1).max()) if null.numel() else 0
        if count == 0:
            return basis
        null = null[..., :count]
        basis[..., :count], now = _resolved_within(matrix, basis[..., :count], null, share)
        now = now | (null & stays[..., :count])
        resolved_more, null = not torch.equal(now, null), now
    null = null.unsqueeze(-2)
    some = torch.where(null, basis[..., :count], 0)  # (k, n, count)
    units, is_unit = _units(unused, count, some)
    # In whole blocks of 16: a generator gives other numbers to what is left of one, and others of the stack need more.
    drawn = torch.randn(-(-count * n // 16) * 16, generator=torch.Generator().manual_seed(n), dtype=torch.float32)
    numbers = drawn[: count * n].reshape(count, n).mT.to(some)
    used = ~unused.unsqueeze(-1)
    left, right = torch.linalg.qr(some.mT @ torch.where(is_unit, units, numbers * used))
    signs = torch.where(right.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(left).unsqueeze(-2)
    basis = basis * used
    basis[..., :count] = torch.where(
        is_unit, units, torch.where(null, some @ (left * signs) * used, basis[..., :count])
    )
    return basis


def _resolved_within(matrix: Tensor, basis: Tensor, null: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The eigenvectors within null spaces, and which of them stay null.

    Args:
        matrix: A ``(k, n, n)``.
        basis: The first eigenvectors ``(k, n, count)``.
        null: Which of them are a basis of the null space ``(k, count)``.
        share: Of s, below which an eigenvalue is not resolved.
    """
    members = null.unsqueeze(-2)
    some = torch.where(members, basis, 0)
    inner = some.mT @ matrix @ some
    lengths = some.norm(dim=-1, keepdim=True)
    bound = share * (lengths.mT @ matrix.abs() @ lengths).squeeze(-1)  # (k, 1)
    trace = inner.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    more = trace > bound  # (k, 1): a matrix without more to resolve stays as it is, whatever others of the stack have
    if not bool(more.any()):
        return basis, null
    # Columns that are no members stay where they are: behind these, and apart, by a bound on all eigenvalues, which
    # the trace is not where it is a rounding error.
    size = inner.abs().sum(-1).amax(-1, keepdim=True)
    apart = torch.where(null, 0, torch.where(size > 0, 2 * size, 1))
    values, turn = spectrum(inner + torch.diag_embed(apart))
    return torch.where(members & more.unsqueeze(-1), some @ turn, basis), null & ((values <= bound) | ~more)


def _units(unused: Tensor, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(k, n, count)`` of unused rows ``(k, n)`` in the first columns, and whether a column has one."""
    order = unused.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]
    units = torch.zeros_like(like).scatter_(-2, order.unsqueeze(-2), 1.0)
    return units, (torch.arange(count, device=like.device) < unused.sum(-1, keepdim=True)).unsqueeze(-2)


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors, each with its largest entry positive, so that signs do not depend on the routine.

    Raises:
        SolverError: If the decomposition fails.
    """
    vectors = singular_value_decomposition(matrix)[0][:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).contiguous()


def improved_basis(matrix: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration from the bases of nearby matrices ``(k, n, n)``, columns in their old order."""
    return Subspace().improve(Dense(matrix, is_gram=True), basis)


def symmetric_power(matrix: Tensor, exponent: float, floor: float) -> Tensor:
    """``Q max(s, floor)^exponent Q^T`` of positive semi-definite matrices ``Q diag(s) Q^T``.

    Eigenvalues below the precision in units of the largest are rounding errors, and count as that: the negative power
    of a smaller one, of a direction that no gradient has, would hide all others in the sum.
    """
    values, basis = spectrum(matrix)
    noise = values[..., -1:] * torch.finfo(values.dtype).eps
    return (basis * values.clamp(min=floor).maximum(noise).pow(exponent).unsqueeze(-2)) @ basis.mT


def rotated_root(second_moment: Tensor, weight: float, eps: float) -> Tensor:
    r""":math:`\sqrt{V / w} + \epsilon` for second moments ``(k, *shape)`` in a basis, infinite at rounding errors.

    A gradient of low rank has entries of zero in its own basis, which come out as rounding errors; divided by
    themselves they would become steps in random directions. They are below the precision times the condition of the
    basis, of which the precision to the power of 4/5 leaves room for three decimal digits in float64 and one in
    float32. Entries that are 3e5 times smaller than the largest, as columns of a raw table may be, still move in it.

    Args:
        second_moment: V, an average that began at zero.
        weight: w, the weight of what was averaged.
        eps: :math:`\epsilon`.
    """
    root = (second_moment / weight).sqrt_()
    noise = largest(root).mul_(torch.finfo(root.dtype).eps ** 0.8)
    above = (root - noise).relu_().sign_()  # faster than a mask
    return root.add_(eps or torch.finfo(root.dtype).tiny).div_(above)


def resolved(rotated: Tensor) -> Tensor:
    """The first gradients ``(k, *shape)`` in their own bases, without entries that a Gram matrix does not resolve.

    Its eigenvectors are those of singular values down to the root of the precision, in units of the largest; entries
    below that are rounding errors of the decomposition.
    """
    size = rotated.abs()
    return torch.where(size > largest(size).mul_(torch.finfo(size.dtype).eps ** 0.5), rotated, 0)


def largest(x: Tensor) -> Tensor:
    """Largest entry of each tensor of a stack ``(k, *shape)``, ``(k, 1, ...)``."""
    return x.amax(tuple(range(1, x.ndim)), keepdim=True)
