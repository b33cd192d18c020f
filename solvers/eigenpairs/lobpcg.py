r"""LOBPCG: the smallest eigenpairs of an operator that has a good approximate inverse.

Each step minimises the Rayleigh quotient over the current vectors, their preconditioned residuals and the directions of
the step before. Knyazev (2001), https://doi.org/10.1137/S1064827500366124; with orthonormal bases, as Hetmaniuk and
Lehoucq (2006), https://doi.org/10.1016/j.jcp.2006.02.007, which keeps it stable near convergence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.eigenpairs.result import Wanted
from solvers.estimates.probes import FlatProduct, norm, orthonormal
from solvers.operators.decompositions import eigendecomposition, singular_value_decomposition
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.errors import NonFiniteError, NotPositiveDefiniteError


@dataclass
class LOBPCG:
    """State of the iteration; rows are vectors, ``images`` their products.

    Attributes:
        op: The operator, for error messages.
        product: Products with it.
        precondition: Products with the approximate inverse.
        wanted: Which pairs are wanted: a number of the smallest ("SA").
        x: Current vectors ``(b, n)``, orthonormal; b is a few more than are wanted.
        ax: Their images.
        p: Directions of the step before ``(c, n)``, orthonormal and orthogonal to x.
        ap: Their images.
        values: Rayleigh quotients of x, ascending ``(b,)``.
        size: Norm of the operator, as far as it has been seen.
        products: Products spent.
    """

    op: LinearOperator
    product: FlatProduct
    precondition: FlatProduct
    wanted: Wanted
    x: Tensor
    ax: Tensor
    p: Tensor
    ap: Tensor
    values: Tensor
    size: Tensor
    products: int

    @classmethod
    def start(
        cls,
        op: LinearOperator,
        product: FlatProduct,
        precondition: FlatProduct,
        wanted: Wanted,
        start: Tensor,
    ) -> LOBPCG:
        """Begin from vectors ``(b, n)``."""
        x = orthonormal(start)
        ax = product(x)
        empty = x[:0]
        values, rotation = _rayleigh_ritz(op, x, ax)
        x, ax = rotation.mT @ x, rotation.mT @ ax
        return cls(op, product, precondition, wanted, x, ax, empty, empty, values, values.abs().amax(), len(x))

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors."""
        names = ("x", "ax", "p", "ap", "values", "size")
        return {name: getattr(self, name).clone() for name in names} | {"products": torch.tensor(self.products)}

    @classmethod
    def resume(
        cls,
        op: LinearOperator,
        product: FlatProduct,
        precondition: FlatProduct,
        wanted: Wanted,
        state: dict[str, Tensor],
    ) -> LOBPCG:
        """Restore :meth:`state`."""
        tensors = {name: state[name].to(op.device) for name in ("x", "ax", "p", "ap", "values", "size")}
        return cls(op, product, precondition, wanted, **tensors, products=int(state["products"]))

    def settled(self) -> bool:
        """Whether a resumed run is known to have finished; the next step finds out at no cost."""
        return False

    def step(self) -> bool:
        """One iteration, a product for each vector not yet converged. Returns whether all wanted ones have."""
        rest = self.ax - self.values.unsqueeze(1) * self.x
        open_ = norm(rest) > self.wanted.tolerance(self.values.double(), self.size) / 2
        if not bool(open_[: self.wanted.k].any()):
            return True
        w = self.precondition(rest[open_])
        self._check_preconditioner(rest[open_], w)
        w = _orthonormal_to(torch.cat([self.x, self.p]), w)
        if len(w) == 0:
            return True  # x and p fill the space
        aw = self.product(w)
        self.products += len(w)
        basis, images = torch.cat([self.x, w, self.p]), torch.cat([self.ax, aw, self.ap])
        values, rotation = _rayleigh_ritz(self.op, basis, images)
        self.size = torch.maximum(self.size, values.abs().amax())
        b = len(self.x)
        best = rotation[:, :b]
        # The new directions: the parts of the open vectors outside the old ones, made orthogonal to the new ones.
        moved = best[:, open_].clone()
        moved[:b] = 0
        away = _orthonormal_to(best.mT, moved.mT)
        self.p, self.ap = away @ basis, away @ images
        self.x, self.ax, self.values = best.mT @ basis, best.mT @ images, values[:b]
        return False

    def _check_preconditioner(self, rest: Tensor, w: Tensor) -> None:
        if not bool(((rest * w).sum(-1) > 0).all()):
            if not bool(torch.isfinite(w).all()):
                raise NonFiniteError("The preconditioner gives NaN or infinity.")
            raise NotPositiveDefiniteError(
                "The preconditioner is not positive definite: r^T P r <= 0 for a residual r. It should be near op^-1."
            )

    def result(self) -> tuple[Tensor, float]:
        """The wanted vectors ``(k, n)`` and the norm of the operator."""
        return self.x[: self.wanted.k].clone(), float(self.size)


def _rayleigh_ritz(op: LinearOperator, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    form = basis @ images.mT
    if not bool(torch.isfinite(form).all()):
        raise NonFiniteError(
            f"eigsh met NaN or infinity in the products of {op!r}. Leave the batch that caused it out, or use float64."
        )
    values, vectors = eigendecomposition(form.double() / 2 + form.double().mT / 2)
    return values.to(basis.dtype), vectors.to(basis.dtype)


def _orthonormal_to(basis: Tensor, x: Tensor) -> Tensor:
    """Orthonormal rows that span what those of x have outside the span of ``basis``; dependent ones drop out."""
    for _ in range(2):
        x = x / norm(x).clamp(min=torch.finfo(torch.float64).tiny).to(x.dtype).unsqueeze(1)
        x = x - (x @ basis.mT) @ basis
        _, sizes, rows = singular_value_decomposition(x)
        x = rows[sizes > 1e3 * torch.finfo(x.dtype).eps]
    return x
