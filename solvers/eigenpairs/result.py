"""The result of an eigensolver, its request, and the test that a pair has converged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from solvers.eigenpairs.storage import Storage, orthonormalize, rotate
from solvers.estimates.probes import FlatProduct, default_batch, norm
from solvers.operators.decompositions import eigendecomposition
from solvers.operators.dense import symmetric_part
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, flag, instance, number, whole
from solvers.outcome.solution import OnFailure, not_converged

Which = Literal["LA", "SA", "LM", "BE"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenpairs of a symmetric operator.

    Attributes:
        values: Eigenvalues ``(k,)``, in the order of ``which``: largest first for "LA" and "LM", smallest first for
            "SA", ascending for "BE".
        vectors: Orthonormal eigenvectors ``(k, *in_shape)``, so that ``op @ vectors`` multiplies all of them.
        residuals: ``|A v - lam v|`` of each pair, by a product made for it at the end ``(k,)``. An eigenvalue lies
            within this distance of ``lam``.
        converged: Which residuals meet the tolerance, boolean ``(k,)``.
        complete: Whether the iteration finished, including the search for repeated eigenvalues. Otherwise the pairs are
            valid, but others may belong in their place.
        products: Products with the operator, counted in vectors.
        state: Tensors from which ``eigsh(op, state=...)`` goes on as if it had never stopped.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    complete: bool
    products: int
    state: dict[str, Tensor]


def check_search(
    rtol: float | None,
    atol: float,
    max_products: int | None,
    basis_size: int | None,
    generator: torch.Generator | None,
    on_failure: OnFailure,
    progress: bool | None,
) -> None:
    """Refuse options of a search for eigenpairs or singular triplets that mean nothing.

    Raises:
        TypeError, ValueError: Naming the option.
    """
    number("rtol", rtol, low=0, optional=True)
    number("atol", atol, low=0)
    whole("max_products", max_products, optional=True)
    whole("basis_size", basis_size, optional=True)
    instance("generator", generator, torch.Generator, "a torch.Generator", optional=True)
    choice("on_failure", on_failure, OnFailure)
    flag("progress", progress, optional=True)


@dataclass(frozen=True)
class Wanted:
    """Which eigenvalues are wanted, and how exact.

    Args:
        k: How many.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude, "BE" from both ends (one more from the upper).
        rtol: Residual wanted, relative to the eigenvalue.
        atol: Residual wanted at least, absolute.
        eps: Rounding unit of the products.

    Raises:
        ValueError: If ``which`` is unknown.
    """

    k: int
    which: Which
    rtol: float
    atol: float
    eps: float

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not isinstance(self.which, str) or self.which not in get_args(Which):
            raise ValueError(
                f"which is one of {', '.join(get_args(Which))}, not {self.which!r}. For eigenvalues near zero take "
                "the largest ones of op.inverse()."
            )

    def order(self, values: Tensor) -> Tensor:
        """Indices of ascending ``values``, the most wanted first."""
        ascending = torch.arange(len(values), device=values.device)
        match self.which:
            case "LA":
                return ascending.flip(0)
            case "SA":
                return ascending
            case "LM":
                return values.abs().argsort(descending=True, stable=True)
        # from the two ends in turn, the upper one first
        return torch.stack([ascending.flip(0), ascending], 1).flatten()[: len(values)]

    def merit(self, values: Tensor) -> Tensor:
        """Key by which eigenvalues on one side of the selection are compared."""
        return values.abs() if self.which == "LM" else values

    def rivals(self, order: Tensor) -> list[tuple[int, Tensor]]:
        """For each end of the spectrum, the first index left out and those selected there, the last one last."""
        ends = 2 if self.which == "BE" and self.k > 1 else 1
        places = range(self.k, min(self.k + ends, len(order)))
        return [(int(order[place]), order[place % ends : self.k : ends]) for place in places]

    def output(self, values: Tensor) -> Tensor:
        """Order in which the selected pairs are returned."""
        match self.which:
            case "LA":
                return values.argsort(descending=True)
            case "LM":
                return values.abs().argsort(descending=True)
        return values.argsort()

    def tolerance(self, values: Tensor, size: Tensor | float) -> Tensor:
        """Residual that each pair has to reach: no less than the rounding errors of an operator of norm ``size``."""
        return (self.rtol * values.abs()).clamp(min=max(self.atol, 40 * self.eps * float(size)))


def finish(
    op: LinearOperator,
    product: FlatProduct,
    storage: Storage,
    vectors: Tensor,
    wanted: Wanted,
    size: float,
    products: int,
    state: dict[str, Tensor],
    complete: bool,
    on_failure: OnFailure,
) -> Eigenpairs:
    """Pairs in the span of ``vectors (k, n)`` with their true residuals; k products.

    Args:
        op: The operator.
        product: Products with it.
        storage: Where the rows are kept.
        vectors: Nearly orthonormal rows; overwritten.
        wanted: What was asked for.
        size: Norm of the operator, for its rounding errors.
        products: Products spent before.
        state: How to go on.
        complete: Whether the iteration finished.
        on_failure: Whether to "warn" or to "raise" if a pair misses its tolerance.

    Raises:
        NotConvergedError: If one does, or the iteration did not end, and ``on_failure`` is "raise".
    """
    orthonormalize(vectors)
    images = storage.rows(len(vectors))
    batch = default_batch(op, None)
    for source, target in zip(vectors.split(batch), images.split(batch), strict=True):
        target.copy_(product(source))
    values, rotation = eigendecomposition(symmetric_part(vectors @ images.mT))
    chosen = wanted.output(values)
    values, rotation = values[chosen], rotation[:, chosen].mT
    for rows in (vectors, images):
        rotate(rows, rotation, rows)
    triples = zip(vectors.split(1), images.split(1), values, strict=True)
    residuals = torch.cat([norm(image - value * vector) for vector, image, value in triples])
    converged = residuals <= wanted.tolerance(values.double(), size)
    if not (complete and bool(converged.all())):
        trouble = (
            f"{int((~converged).sum())} of {wanted.k} pairs have not converged in {products} products; the largest "
            f"residual is {float(residuals.max()):.3g}"
        )
        if bool(converged.all()):
            trouble = f"all pairs have converged, but {products} products did not do for the search of repeated ones"
        not_converged(
            f"eigsh of {op!r}: {trouble}. Go on with eigsh(op, state=pairs.state), or allow more max_products, a "
            "larger basis_size or a larger rtol.",
            on_failure,
            3,
        )
    return Eigenpairs(
        values,
        vectors.reshape(-1, *op.in_shape),
        residuals.to(values.dtype),
        converged,
        complete,
        products + wanted.k,
        state,
    )
