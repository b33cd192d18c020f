r"""Traces of functions of a whitened curvature, for all hyperparameters from one run of Lanczos.

For :math:`\hat H = a P^{-1/2} H P^{-1/2}` these are the traces of :math:`\log(I + \hat H)` and
:math:`\hat H (I + \hat H)^{-1}`. A common factor of P, the noise and the temperature multiply :math:`\hat H` by a
number, hence the nodes of its quadratures.

Axis letters: m random vectors, l rows of the sketch, k steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.laplace.matrix_free.linearized import LinearizedLaplace
from solvers import Estimate, LinearOperator, LowRank, NotPositiveDefiniteError, Nystrom
from solvers.estimates.estimate import Mean
from solvers.estimates.lanczos import Quadrature, quadrature, remaining
from solvers.estimates.probes import default_batch, flat_product, signs
from solvers.operators.decompositions import eigendecomposition, eigenvalues

_CHUNK = 1 << 18
#: Sketches the best determined directions; a product for each of its rows, once.
SKETCH = Nystrom(rank=50)


@dataclass(frozen=True, eq=False)
class Known:
    r"""Random vectors seen through a sketch :math:`U \operatorname{diag}(s) U^\top` of the curvature.

    The quadratic form of a function of the sketch has the trace of that function for its mean. Where the sketch has
    most of the curvature, subtracting its deviation from the mean leaves little of the variance (Persson, Cortinovis
    and Kressner, 2022).

    Attributes:
        values: s, ``(l,)``, float64.
        excess: :math:`(u_j^\top z_i)^2 - 1`, ``(m, l)``, float64.
    """

    values: Tensor
    excess: Tensor

    @classmethod
    def of(cls, rows: Tensor, vectors: Tensor) -> Known:
        """From a root ``(l, P)`` of the sketch and random vectors ``(m, P)``."""
        # In float64, where vectors that are the combination of large ones are still of unit norm, which the mean takes.
        gram = torch.stack([part.double() @ part.double().mT for part in rows.split(_CHUNK, -1)]).sum(0)
        s, W = eigendecomposition(gram)
        keep = s > s.amax() * torch.finfo(rows.dtype).eps * len(s)
        s, W = s[keep], W[:, keep]
        along = (vectors @ rows.mT).double() @ W / s.sqrt()
        return cls(s, along.square() - 1)


Rule = tuple[Quadrature, Known | None]


class WhitenedTraces:
    """Both traces, estimated from the same random vectors for any hyperparameters.

    Args:
        posterior: Says which curvature; its hyperparameters do not matter.
        samples: Random vectors; with no fewer than dimensions the matrix is formed instead.
        steps: Products per vector at most.
        sketch: Reduces the variance where the curvature is positive semi-definite, for as many products as its rank; or
            ``None``.
        batch_size: Vectors per product; ``None`` takes what fits in 256 MiB.
        seed: Of the random vectors, which are drawn again for each run: they are as large as the model.

    Attributes:
        products: Products with the curvature that were spent, counted in vectors.
    """

    def __init__(
        self,
        posterior: LinearizedLaplace,
        samples: int,
        steps: int,
        sketch: Nystrom | None,
        batch_size: int | None,
        seed: int,
    ) -> None:
        self._size = size = posterior.parameters.size
        self.whole = samples >= size
        self.samples, self.steps, self.seed, self.products = min(samples, size), min(steps, size), seed, 0
        self._batch = default_batch(posterior.curvature, batch_size)
        self._eps = torch.finfo(posterior.curvature.dtype).eps
        self._root: Tensor | None = None
        if sketch is not None and not self.whole:
            self.products = min(sketch.rank, size)
            with contextlib.suppress(NotPositiveDefiniteError):  # one that is indefinite does without a sketch
                near: LowRank = sketch.approximate(posterior.curvature)
                assert isinstance(near.root, Tensor)
                self._root = near.root
        self._shape: Tensor | None = None
        self._rules: list[Rule] = []

    def __call__(self, posterior: LinearizedLaplace) -> tuple[Estimate, Estimate]:
        """Traces of ``log(I + H^)`` and ``H^ (I + H^)^-1``.

        Raises:
            NotPositiveDefiniteError: If ``I + H^`` is seen not to be positive definite.
        """
        largest = posterior.prior.values.max()
        factor = posterior.scale / float(largest)  # times the curvature whitened by the shape of the prior is H^
        means, changes = Mean(), Mean()
        for rule, known in self._quadratures(posterior, posterior.prior.values / largest, factor):
            values, change = self._integrals(rule, known, factor)
            means.add(values)
            changes.add(change.transpose(0, 1))
        systematic = remaining(changes.value)
        stderr = torch.hypot(torch.zeros_like(systematic) if self.whole else means.stderr, systematic)
        spent = 0 if self.whole else self.samples
        pair = [Estimate(means.value[i], stderr[i], spent, self.products, systematic[i]) for i in (0, 1)]
        return pair[0], pair[1]

    def _quadratures(self, posterior: LinearizedLaplace, shape: Tensor, factor: float) -> list[Rule]:
        """Quadratures of the curvature whitened by a prior of this shape, good enough for this factor."""
        same = self._shape is not None and self._shape.shape == shape.shape
        if not (same and torch.allclose(shape, self._shape, rtol=1e-12, atol=0)):  # type: ignore[arg-type]
            self._shape, self._rules = shape, []
        if self._rules and all(
            rule.steps >= self.steps or self._settled(rule, known, factor, 0.2) for rule, known in self._rules
        ):
            return self._rules
        at = posterior.at(shape, 1.0, 1.0)
        op = at.whitened()
        self._rules = [(self._exact(op), None)] if self.whole else self._run(at, op, factor)
        return self._rules

    def _exact(self, op: LinearOperator) -> Quadrature:
        self.products += op.shape[0]
        values = eigenvalues(op.to_dense().double()).unsqueeze(0)
        pair = values, torch.full_like(values, 1 / values.numel())
        self.steps = min(self.steps, values.numel())
        return Quadrature(*pair, (pair, pair))

    def _run(self, posterior: LinearizedLaplace, op: LinearOperator, factor: float) -> list[Rule]:
        rows = None if self._root is None else self._root * posterior.prior.expand().rsqrt().to(op.dtype)
        generator = torch.Generator(op.device).manual_seed(self.seed)
        product, rules = flat_product(op), []
        for start in range(0, self.samples, self._batch):
            vectors = signs(op, min(self._batch, self.samples - start), generator)
            known = None if rows is None else Known.of(rows, vectors)

            def settled(rule: Quadrature, known: Known | None = known) -> bool:
                return self._settled(rule, known, factor, 0.05)

            rule = quadrature(op, product, vectors, self.steps, settled)
            self.products += len(vectors) * rule.steps
            rules.append((rule, known))
        return rules

    def _settled(self, rule: Quadrature, known: Known | None, factor: float, share: float) -> bool:
        """Whether the error of the steps is at most this share of the error of the random vectors."""
        values, changes = self._integrals(rule, known, factor)
        spread = values.std(0) * self.samples**-0.5 if len(values) > 1 else torch.zeros_like(values[0])
        floor = self._eps**0.5 * values.mean(0).abs()
        return bool((remaining(changes.mean(1)) <= torch.maximum(share * spread, floor)).all())

    def _integrals(self, rule: Quadrature, known: Known | None, factor: float) -> tuple[Tensor, Tensor]:
        """Both quadratic forms for each vector ``(m, 2)``, and their changes by the steps ``(2, m, 2)``."""
        lowest = factor * rule.nodes.min()
        if not bool(lowest > -1):
            raise NotPositiveDefiniteError(
                f"the precision a H + P has the eigenvalue {float(1 + lowest):.3g} in units of the prior: (a) the loss "
                "is not convex in the outputs, (b) the prior is too weak for the eigenvalues of the curvature to be "
                f"told from zero in this dtype (eps {self._eps:.1g}). Use a larger prior precision or float64."
            )
        values, changes = rule.apply(lambda nodes: _both(factor * nodes))
        values, changes = self._size * values, self._size * changes  # the quadrature is of vectors of unit norm
        return values if known is None else values - known.excess @ _both(factor * known.values), changes


def _both(theta: Tensor) -> Tensor:
    return torch.stack([theta.log1p(), theta / (1 + theta)], -1)


def seed_from(generator: torch.Generator | None) -> int:
    """A seed drawn from the user's generator, wherever it lives; 0 without one."""
    if generator is None:
        return 0
    return int(torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator))
