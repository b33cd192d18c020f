r"""Thick-restart Lanczos with full reorthogonalisation.

The basis grows by one product per step. When it is full it shrinks to the Ritz vectors nearest to what is wanted, and
continues from there, nearly as well as a basis that never restarts. Wu and Simon (2000),
https://doi.org/10.1137/S0895479898334605.

Lanczos from one vector sees one copy of a repeated eigenvalue; the others come by rounding, late. So once all pairs
have converged, a random vector orthogonal to them starts again, until a copy that had been missed would have come up:
it then enters the wanted ones, converges, and the search starts again.

The basis is ``(rows, n)``; the projected matrix and all decisions on it are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import acosh

import torch
from torch import Tensor

from solvers.eigenpairs.result import Wanted
from solvers.eigenpairs.storage import Storage, rotate
from solvers.estimates.probes import FlatProduct, norm
from solvers.operators.decompositions import eigendecomposition
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.errors import NonFiniteError

# Share of a vector that a pass of orthogonalisation leaves where it need not be repeated: Daniel, Gragg, Kaufman and
# Stewart (1976), https://doi.org/10.1090/S0025-5718-1976-0431641-8.
_KEPT = 0.5**0.5
_LOOKS = 40  # most checks of the projected matrix while a basis fills


@dataclass
class ThickRestart:
    """State of the iteration; it can be stored after every step.

    Attributes:
        op: The operator, for error messages.
        product: Products with it.
        wanted: What is looked for.
        storage: Where the basis is kept.
        generator: Where random vectors come from.
        basis: Orthonormal rows ``(size + 1, n)``, of which the first ``count`` have been multiplied and the next one
            is about to be.
        matrix: Projection of the scaled operator ``(size, size)``, symmetric, float64.
        count: Number of rows multiplied since the restart, and kept by it.
        beta: Norm of what the last product left outside the basis, scaled.
        scale: Norm of the first product; the iteration runs on ``A / scale``, free of over- and underflow.
        products: Products spent.
        found: Eigenvalues, scaled, that had converged when a search for missed copies began; empty before.
        searched: Products spent on that search.
        needed: Products that the search takes, by the spectrum as known when it began.
        complete: Whether everything had converged at the last check.
        search: Whether to search for missed copies.
    """

    op: LinearOperator
    product: FlatProduct
    wanted: Wanted
    storage: Storage
    generator: torch.Generator
    basis: Tensor
    matrix: Tensor
    count: int
    beta: Tensor
    scale: Tensor
    products: int
    found: Tensor
    searched: int = 0
    needed: float = 0.0
    complete: bool = False
    search: bool = True

    @classmethod
    def start(
        cls,
        op: LinearOperator,
        product: FlatProduct,
        wanted: Wanted,
        storage: Storage,
        generator: torch.Generator,
        size: int,
        start: Tensor,
    ) -> ThickRestart:
        """Begin from one vector ``(n,)``."""
        length = norm(start)
        if not bool(torch.isfinite(length) & (length > 0)):
            raise ValueError("v0 needs a finite vector that is not zero.")
        basis = storage.rows(size + 1)
        zeros = torch.zeros(size, size, dtype=torch.float64, device=basis.device)
        nothing = zeros[0, :0]
        run = cls(op, product, wanted, storage, generator, basis, zeros, 0, zeros.sum(), zeros.sum(), 0, nothing)
        run.begin(start)
        return run

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors; rows in files are not copied."""
        basis = self.basis[: self.count + 1]
        return {
            "basis": basis.clone() if self.storage.folder is None else basis,
            "matrix": self.matrix.clone(),
            "beta": self.beta,
            "scale": self.scale,
            "products": torch.tensor(self.products),
            "found": self.found,
            "searched": torch.tensor(self.searched),
            "needed": torch.tensor(self.needed, dtype=torch.float64),
            "complete": torch.tensor(self.complete),
            "tolerance": torch.tensor([self.wanted.rtol, self.wanted.atol], dtype=torch.float64),
            "generator": self.generator.get_state(),
            "generator_on_host": torch.tensor(self.generator.device.type == "cpu"),
        }

    @classmethod
    def resume(
        cls,
        op: LinearOperator,
        product: FlatProduct,
        wanted: Wanted,
        storage: Storage,
        state: dict[str, Tensor],
    ) -> ThickRestart:
        """Restore :meth:`state`, possibly with another tolerance."""
        rows, home = state["basis"], storage.home
        matrix = state["matrix"].to(home).clone()
        basis = storage.rows(len(matrix) + 1)
        basis[: len(rows)] = rows
        generator = torch.Generator("cpu" if bool(state["generator_on_host"]) else op.device)
        generator.set_state(state["generator"].cpu())
        beta, scale, found = (state[name].to(home) for name in ("beta", "scale", "found"))
        numbers = (int(state["products"]), found, int(state["searched"]), float(state["needed"]))
        count, complete = len(rows) - 1, bool(state["complete"])
        run = cls(op, product, wanted, storage, generator, basis, matrix, count, beta, scale, *numbers, complete)
        rtol, atol = state["tolerance"].tolist()
        if len(found) and (wanted.rtol < rtol or wanted.atol < atol):
            # The search removed the residuals of the vectors it found: their improvement must start again.
            run.begin(run.result()[0].sum(0))
        return run

    def begin(self, start: Tensor) -> None:
        """Forget all but the products spent; start from a vector ``(n,)``, which is not zero."""
        self.basis[0] = start / norm(start).to(start.dtype)
        self.matrix.zero_()
        self.count, self.found, self.searched, self.needed, self.complete = 0, self.found[:0], 0, 0.0, False

    @property
    def size(self) -> int:
        """Rows that the basis may have."""
        return self.matrix.shape[0]

    def random(self, kept: Tensor) -> Tensor:
        """A random unit vector ``(n,)`` orthogonal to the rows ``kept``."""
        n, device = self.basis.shape[1], self.generator.device
        vector = torch.randn(n, generator=self.generator, dtype=self.basis.dtype, device=device).to(self.basis.device)
        for _ in range(2):
            vector = vector - (kept @ vector) @ kept
            vector = vector / norm(vector).to(vector.dtype)
        return vector

    def step(self) -> bool:
        """Multiply once; check and restart when due. Returns whether everything has converged."""
        self.expand()
        full = self.count == self.size
        due = full or self.count % (1 + self.size // _LOOKS) == 0
        self.complete = due and self.count >= self.wanted.k and self.look(full)
        return self.complete

    def settled(self) -> bool:
        """Whether a resumed run had finished by the present tolerances; costs no product."""
        self.complete = self.complete and self.look(self.count == self.size)
        return self.complete

    def expand(self) -> None:
        """One Lanczos step with full orthogonalisation."""
        i, basis = self.count, self.basis[: self.count + 1]
        image = self.product(basis[i:]).squeeze(0)
        if self.products == 0:
            length = norm(image)
            self.scale = torch.where((length > 0) & torch.isfinite(length), length, 1)
        image = image / self.scale.to(image.dtype)
        # Nearly all of what is inside lies along the last two rows; without it one pass over the basis does, as a rule.
        near = basis[max(0, i - 1) :]
        coefficients = near @ image
        image.addmv_(near.mT, coefficients, alpha=-1)
        projected = torch.zeros(i + 1, dtype=torch.float64, device=image.device)
        projected[-len(near) :] = coefficients.double()
        exhausted, size = False, norm(image)
        for again in range(2):
            inside = basis @ image
            image.addmv_(basis.mT, inside, alpha=-1)
            projected += inside.double()
            before, size = size, norm(image)
            if bool(size > _KEPT * before):
                break
            exhausted = again == 1  # taken once more, most of the rest turns out to be rounding
        self.beta = size
        self.matrix[i, : i + 1] = projected
        self.matrix[: i + 1, i] = projected
        self.count += 1
        self.products += 1
        self.searched += 1
        if self.count == self.basis.shape[1]:
            self.beta = torch.zeros_like(self.beta)  # the basis spans the whole space
            return
        self.basis[i + 1] = self.random(basis) if exhausted else image / self.beta.to(image.dtype)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues ascending, vectors in columns and residual estimates of the projected matrix, scaled, on CPU."""
        matrix, beta = self.matrix[: self.count, : self.count].cpu(), self.beta.cpu()
        if not bool(torch.isfinite(matrix).all() & torch.isfinite(beta)):
            raise NonFiniteError(
                f"eigsh met NaN or infinity in the products of {self.op!r}. Leave the batch that caused it out, or use "
                "float64."
            )
        values, vectors = eigendecomposition(matrix)
        return values, vectors, beta * vectors[-1].abs()

    def look(self, full: bool) -> bool:
        """Check the Ritz pairs, and restart if needed. Returns whether everything has converged."""
        values, vectors, residuals = self.ritz()
        order = self.wanted.order(values)
        chosen, size = order[: self.wanted.k], float(values.abs().max())
        # Half of the tolerance is reserved for later rotations and rounding.
        tolerance = self.scaled().tolerance(values, size) / 2
        if bool((residuals <= tolerance)[chosen].all()):
            if self.count == self.basis.shape[1] or not self.search:
                return True
            needed = self.search_length(values, order, tolerance)
            settled = len(self.found) > 0 and bool(
                ((values[chosen].sort().values - self.found.cpu()).abs() <= 4 * tolerance[chosen].max()).all()
            )
            if not settled:
                self.found, self.searched = values[chosen].sort().values.to(self.matrix.device), 0
                self.needed = needed
                if needed > 0:
                    self.restart(values, vectors, chosen, fresh=True)
                    return False
            if self.searched >= max(needed, self.needed):
                return True
        if full:
            # Ritz vectors beside the wanted ones keep the information about the gap.
            keep = min(self.wanted.k + (self.size - self.wanted.k) // 2, self.size - 1)
            self.restart(values, vectors, order[:keep])
        return False

    def search_length(self, values: Tensor, order: Tensor, tolerance: Tensor) -> float:
        r"""Number of products after which a missing copy would have appeared.

        A copy counts if it lies beyond the last eigenvalue selected. Its share in a random vector is about
        :math:`n^{-1/2}`, and j products multiply that, in comparison with the rest of the spectrum, by the Chebyshev
        polynomial :math:`T_j(1 + 2 \gamma)`, where gamma is its distance from the rest over the width of the rest, and
        one where nothing is known of the rest. Saad (1980), https://doi.org/10.1137/0717059.
        """
        share = acosh(20 * self.basis.shape[1] ** 0.5)
        length = 0.0 if len(order) > self.wanted.k else share / acosh(3)
        rest = torch.ones_like(values, dtype=torch.bool).index_fill(0, order[: self.wanted.k], False)
        merit = self.wanted.merit(values)
        for out, selected in self.wanted.rivals(order):
            beyond = (merit[selected] - merit[selected[-1]]).abs() > 2 * tolerance[selected]
            gaps = (merit[selected][beyond] - merit[out]).abs()
            if len(gaps):
                width = max(float((values[rest] - values[out]).abs().max()), float(gaps.min()))
                length = max(length, share / acosh(1 + 2 * float(gaps.min()) / width))
        return length

    def scaled(self) -> Wanted:
        """The tolerances for ``A / scale``."""
        w = self.wanted
        return Wanted(w.k, w.which, w.rtol, w.atol / float(self.scale), w.eps)

    def restart(self, values: Tensor, vectors: Tensor, keep: Tensor, fresh: bool = False) -> None:
        """Shrink the basis to Ritz vectors; go on from the next vector, or from a random one if ``fresh``."""
        rotation = vectors[:, keep].mT.to(self.basis)
        follower = self.basis[self.count].clone()
        rotate(self.basis[: len(keep)], rotation, self.basis[: self.count])
        self.basis[len(keep)] = self.random(self.basis[: len(keep)]) if fresh else follower
        self.matrix.zero_()
        self.matrix.diagonal()[: len(keep)] = values[keep].to(self.matrix.device)
        self.count = len(keep)

    def result(self) -> tuple[Tensor, float]:
        """The wanted Ritz vectors ``(k, n)`` and the norm of the operator."""
        values, vectors, _ = self.ritz()
        chosen = self.wanted.order(values)[: self.wanted.k]
        found = self.storage.rows(len(chosen))
        rotate(found, vectors[:, chosen].mT.to(self.basis), self.basis[: self.count])
        return found, float(values.abs().max() * self.scale)
