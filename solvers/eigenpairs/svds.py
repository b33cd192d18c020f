"""Singular values and vectors of any operator known by its products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.eigenpairs.eigsh import eigsh
from solvers.eigenpairs.result import check_search
from solvers.estimates.probes import default_batch, flat_product, norm, require_operator
from solvers.operators.decompositions import singular_value_decomposition
from solvers.operators.function import Function
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import whole
from solvers.outcome.solution import OnFailure, not_converged, silenced
from solvers.precision import without_autocast, working_dtype


@dataclass(frozen=True, eq=False)
class SingularTriplets:
    """The largest singular values of an operator, with their vectors.

    Attributes:
        values: Singular values ``(k,)``, largest first.
        left: Orthonormal left vectors ``(k, *out_shape)``.
        right: Orthonormal right vectors ``(k, *in_shape)``.
        residuals: ``hypot(|A v - s u|, |A^T u - s v|)`` of each triplet, by products made for it at the end ``(k,)``.
        converged: Which residuals meet the tolerance, boolean ``(k,)``.
        products: Products with the operator and with its adjoint, counted in vectors.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


@without_autocast
def svds(
    op: LinearOperator,
    k: int = 10,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_products: int | None = None,
    basis_size: int | None = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> SingularTriplets:
    r"""The k largest singular triplets, by :func:`~solvers.eigsh` of ``A^T A`` or ``A A^T``, whichever is smaller.

    The vectors are refined by a singular value decomposition of their images, so the values are as exact as products
    with A allow. Vectors of singular values below ``sqrt(eps)`` of the largest are beyond the Gram matrix: they come
    out as not converged.

    >>> from solvers import Dense
    >>> svds(Dense(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])), k=1).values
    tensor([4.])

    Args:
        op: Any operator with an adjoint.
        k: How many, at most the smaller dimension.
        rtol: A triplet has converged when its residual is at most ``max(rtol s, atol)``, or rounding allows no better:
            ``100 eps |A|``. None takes ``sqrt(eps)``.
        atol: See ``rtol``; in units of the operator.
        max_products: Products at most, half of them with the adjoint; None takes what :func:`~solvers.eigsh` does.
        basis_size: Vectors that Lanczos keeps; None takes ``max(3 k, 2 k + 20)``.
        generator: Where random vectors are drawn from; None draws the same ones each time.
        on_failure: Whether to "warn" or to "raise" if a triplet misses its tolerance; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Raises:
        ValueError: If the operator has fewer than k singular values.
        NonFiniteError: If a product holds NaN or infinity.
        NotConvergedError: If a triplet misses its tolerance and ``on_failure`` is "raise".
    """
    require_operator(op)
    whole("k", k)
    check_search(rtol, atol, max_products, basis_size, generator, on_failure, progress)
    rows, columns = op.shape
    if not 1 <= k <= min(rows, columns):
        raise ValueError(f"{op!r} has {min(rows, columns)} singular values; k={k} is not between 1 and that.")
    wide = rows < columns
    outer, inner = (op, op.adjoint()) if wide else (op.adjoint(), op)  # the Gram matrix is outer inner
    batch, dtype = default_batch(op, None), working_dtype(op)
    onto, back = flat_product(inner, batch), flat_product(outer, batch)
    # Products of A^T A square the scale: in units of the first product they stay in range.
    size = norm(onto(torch.ones(1, inner.shape[1], dtype=dtype, device=op.device))).to(dtype)
    scale = torch.where(torch.isfinite(size) & (size > 0), size, 1) / inner.shape[1] ** 0.5
    eps = torch.finfo(op.dtype).eps
    rtol = eps**0.5 if rtol is None else rtol

    def gram(x: Tensor) -> Tensor:
        return back(onto(x) / scale) / scale

    with silenced():  # judged below, on the triplets
        pairs = eigsh(
            Function(gram, (inner.shape[1],), symmetric=True, dtype=dtype, device=op.device),
            k,
            rtol=rtol / 2,
            max_products=None if max_products is None else max_products // 2,
            basis_size=basis_size,
            generator=generator,
            progress=progress,
        )
    images = onto(pairs.vectors)  # A v, (k, .)
    left, values, rotation = singular_value_decomposition(images.mT)
    left, right = left.mT, rotation @ pairs.vectors
    residuals = torch.hypot(
        norm(rotation @ images - values.unsqueeze(1) * left), norm(back(left) - values.unsqueeze(1) * right)
    )
    floor = max(atol, 100 * eps * float(values.abs().max()))
    converged = residuals <= (rtol * values.double()).clamp(min=floor)
    products = 2 * pairs.products + 2 * k + 1
    if not bool(converged.all()):
        not_converged(
            f"svds of {op!r}: {int((~converged).sum())} of {k} triplets have not converged in {products} products; the "
            f"largest residual is {float(residuals.max()):.3g}. Allow more max_products, a larger basis_size or a "
            "larger rtol; singular values below sqrt(eps) of the largest need float64.",
            on_failure,
        )
    if wide:
        left, right = right, left
    return SingularTriplets(
        values,
        left.reshape(k, *op.out_shape),
        right.reshape(k, *op.in_shape),
        residuals.to(dtype),
        converged,
        products,
    )
