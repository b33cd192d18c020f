"""Kronecker factors of the inverse by BFGS updates (K-BFGS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import OneHot, Outer, Samples
from curvature.losses.signals import FisherKind
from curvature.structures.diagonal import DiagonalEstimator
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeansEstimator
from curvature.structures.inverse import InverseEstimator
from curvature.structures.kfac import KroneckerEstimator
from curvature.structures.unit import unit_or_diagonal
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, Diagonal, Kronecker, LinearOperator
from solvers.precision import widen


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    r"""The BFGS update of an inverse, :math:`(I - \rho s y^\top) H (I - \rho y s^\top) + \rho s s^\top`.

    Args:
        H: ``(*, d, d)``, symmetric.
        s: Change of the point ``(*, d)``.
        y: Change of the gradient ``(*, d)``; where :math:`s^\top y \le 0` the inverse stays the same.

    Returns:
        ``(*, d, d)``, symmetric to the last bit.
    """
    sy = _dot(s, y).unsqueeze(-1)
    rho = torch.where(sy > 0, 1 / sy, 0)
    Hy = _apply(H, y)
    u = s * (1 + rho[..., 0] * _dot(y, Hy)) / 2 - Hy  # H + rho (s u' + u s') is the same, written symmetrically
    change = rho * s.unsqueeze(-1) * u.unsqueeze(-2)
    return H + (change + change.mT)


def double_damped(H: Tensor, s: Tensor, y: Tensor, mu: float, shift: float) -> tuple[Tensor, Tensor]:
    r"""Powell's damping twice: of the point with respect to the inverse, then of the gradient with respect to I.

    .. math::
        s \leftarrow \theta_1 s + (1 - \theta_1) H y \text{ so that } s^\top y \ge \mu\, y^\top H y, \qquad
        y \leftarrow \theta_2 y + (1 - \theta_2) s \text{ so that } s^\top y \ge \nu\, s^\top s

    each with the largest :math:`\theta \le 1`, so that a pair that satisfies both stays as it is. Then
    :math:`s^\top y > 0` whatever the noise, and the eigenvalues of the updated inverse stay bounded from both sides.
    For :math:`\nu > 1`, which the paper excludes, the second step goes towards :math:`\nu I`.

    Args:
        H: Inverse ``(*, d, d)``.
        s: Change of the point ``(*, d)``.
        y: Change of the gradient ``(*, d)``.
        mu: :math:`\mu`, in (0, 1).
        shift: :math:`\nu`, the damping of the factor.

    References:
        Goldfarb, Ren and Bahamou (2020), algorithm 3, https://arxiv.org/abs/2006.08877, with the second step as in the
        authors' code, https://github.com/renyiryry/kbfgs_neurips2020_public
    """
    Hy = _apply(H, y)
    s = s + _share(_dot(s, y), _dot(y, Hy), mu) * (Hy - s)
    target = max(1.0, shift)
    return s, y + _share(_dot(s, y), target * _dot(s, s), shift / target) * (target * s - y)


def _share(found: Tensor, size: Tensor, bound: float) -> Tensor:
    r"""The least :math:`1 - \theta` with :math:`\theta\, found + (1 - \theta)\, size \ge bound \cdot size`."""
    short = found < bound * size
    return torch.where(short, 1 - (1 - bound) * size / torch.where(short, size - found, 1), 0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products along the last axis, which stays."""
    return (x * y).sum(-1, keepdim=True)


def _apply(H: Tensor, x: Tensor) -> Tensor:
    return (H @ x.unsqueeze(-1).to(H.dtype)).squeeze(-1)


@dataclass
class Means:
    """Mean input ``(*, i)`` and mean output gradient ``(*, o)`` of a pass, over all uses and positions."""

    inputs: WeightedMean
    gradients: WeightedMean

    @classmethod
    def empty(cls) -> Means:
        """Before the pass."""
        return cls(WeightedMean(), WeightedMean())

    def add(self, samples: Samples, uses: list[Outer]) -> None:
        """Add the samples of a backward pass."""
        weight = samples.weight if samples.first else 0.0
        if samples.linear is None:
            raise ValueError(
                "K-BFGS learns from mean gradients, which weights of single terms do not leave. Weigh batches instead."
            )
        for index, use in enumerate(uses):
            if samples.first:
                self.inputs.add(*_sum_of_rows(use, samples.times(use)))
            total = widen(use.g).sum((-4, -3, -2)) * samples.linear
            self.gradients.add(total, weight if index == 0 else 0.0)


def _sum_of_rows(use: Outer, times: int) -> tuple[Tensor, Tensor | float]:
    a = use.a.dense(widen(use.g[:0]).dtype) if isinstance(use.a, OneHot) else widen(use.rows)
    if use.valid is None:
        return a.sum((-3, -2)) * times, float(a.shape[-3] * a.shape[-2] * times)
    valid = use.valid.to(a.dtype)
    return (a * valid.unsqueeze(-1)).sum((-3, -2)), valid.sum()


class KroneckerBFGSEstimator(MeansEstimator, InverseEstimator):
    r"""``H_B (x) H_A`` with BFGS estimates of the inverses of K-FAC's factors.

    .. math::
        H_A:&\quad s = H_A \bar a, \quad y = A s + \nu s, \qquad A = \mathbb E[a a^\top] \\
        H_B:&\quad s = \bar h^+ - \bar h, \quad y = \bar g^+ - \bar g \quad\text{(averaged over steps, double damped)}

    with the mean input :math:`\bar a`, the mean output :math:`\bar h = W \bar a` and its mean gradient
    :math:`\bar g` of a batch, before a step and after it (:math:`^+`), and :math:`\nu = \sqrt\lambda`. :math:`H_A`
    begins as the exact inverse :math:`(A + \nu I)^{-1}`, and learns of a batch before it meets that batch's gradient
    (in the authors' code after it). Pairs are averaged without bias; BFGS does not see their scale. An input factor
    that is diagonal (embeddings) is inverted exactly. Where a matrix is also used from its other side (an embedding
    tied to a head) only the uses as a layer count.

    A step costs ``O(d^2)`` per factor beside A itself, and no decomposition.

    Args:
        block: The block.
        mu: Of Powell's damping.
        initial: Multiple of the identity that :math:`H_B` starts from; ``None`` for :math:`1 / \nu`.
    """

    structure: ClassVar[str] = "kronecker, inverse"
    names = ("factor", "s", "y")
    s: WeightedMean
    y: WeightedMean

    def __init__(self, block: Block, mu: float, initial: float | None) -> None:
        super().__init__(block)
        self.mu, self.initial = mu, initial
        self.factor = KroneckerEstimator(block, gradient_factor="identity")
        self.HA: Tensor | None = None
        self.HB: Tensor | None = None
        self.shift = 0.0
        self._first, self._second = Means.empty(), Means.empty()
        self._ema = 0.0
        self._committed: tuple[Tensor, Tensor] | None = None  # mean input, mean gradient of the step
        self._before: tuple[Tensor, Tensor] | None = None  # mean output and gradient, waiting for those after the step

    def update(self, samples: Samples) -> None:
        outer = [use for use in samples.uses if isinstance(use, Outer)]
        uses = [use for use in outer if not use.flipped] or outer
        if self._before is not None:
            self._second.add(samples, uses)
            return
        self._first.add(samples, uses)
        self.factor.update(samples)

    def count(self, weight: Tensor | float) -> None:
        means = self._first if self._before is None else self._second
        if means.gradients.pending:
            means.gradients.count(weight)
        if self._before is None:
            self.factor.count(weight)

    def step_means(self) -> dict[str, WeightedMean]:
        found = super().step_means()
        for phase, means in (("first", self._first), ("second", self._second)):
            parts = {f"{phase}.inputs": means.inputs, f"{phase}.gradients": means.gradients}
            found |= {name: mean for name, mean in parts.items() if mean.pending}
        return found

    def step_mean(self, name: str) -> WeightedMean:
        phase, _, part = name.partition(".")
        means = {"first": self._first, "second": self._second}.get(phase)
        return super().step_mean(name) if means is None else getattr(means, part)

    def commit(self, ema: float) -> None:
        super().commit(ema)
        self._ema = ema
        if self._first.gradients.pending:
            self._committed = (self._first.inputs.step_mean(), self._first.gradients.step_mean())
        self.discard()

    def discard(self) -> None:
        super().discard()
        self._first, self._second = Means.empty(), Means.empty()

    def witnesses(self) -> list[Tensor]:
        return [*super().witnesses(), self._first.gradients.witness()]

    def improve(self, damping: float) -> None:
        if not damping > 0:
            raise ValueError(f"block {self.block.name}: K-BFGS needs a positive damping, got {damping}.")
        self.shift = damping**0.5
        A = self._A()
        self.HA, self.HB = (H if H is None else H.to(A.dtype) for H in (self.HA, self.HB))
        if self.HB is None:
            start = 1 / self.shift if self.initial is None else self.initial
            eye = torch.eye(self.block.shape[-2], dtype=A.dtype, device=A.device)
            self.HB = (start * eye).expand(*self.block.shape[:-1], self.block.shape[-2]).clone()
        if A.dim() < len(self.block.shape):
            self.HA = 1 / (A + self.shift)
        elif self.HA is None:
            self.HA = torch.cholesky_inverse(torch.linalg.cholesky(Dense(A).add_diagonal(self.shift).matrix))
        elif self._committed is not None:
            s = _apply(self.HA, self._committed[0])
            self.HA = bfgs(self.HA, s, _apply(A, s) + self.shift * s)

    def _A(self) -> Tensor:
        value = self.factor.sides["straight" if "straight" in self.factor.sides else "flipped"][0].value
        assert value is not None
        return value

    @torch.no_grad()
    def begin(self, weights: Tensor) -> None:
        """Before the step: note the mean output.

        Args:
            weights: The block's parameters.
        """
        if self._committed is not None:
            a, g = self._committed
            self._before = (self._output(weights, a), g)
        self._committed = None

    @torch.no_grad()
    def end(self, weights: Tensor) -> None:
        """After the step and a second pass: learn from the changes of outputs and gradients.

        Args:
            weights: The block's parameters.
        """
        before, self._before = self._before, None
        second, self._second = self._second, Means.empty()
        if before is None or not second.gradients.pending or self.HB is None:
            return
        s = self._output(weights, second.inputs.step_mean()) - before[0]
        y = second.gradients.step_mean() - before[1]
        known = [mean.value for mean in (self.s, self.y) if mean.value is not None]
        if not bool(torch.stack([torch.isfinite(x).all() for x in (s, y, *known)]).all()):
            if not all(bool(torch.isfinite(x).all()) for x in known):
                raise FloatingPointError(
                    f"block {self.block.name}: the averages of K-BFGS's pairs hold NaN or inf, so nothing can be "
                    "learnt from here. Load the state of the last checkpoint, or make the optimizer again."
                )
            return  # a diverging step is not used
        for mean, value in ((self.s, s), (self.y, y)):
            mean.add(value, 1.0)
            mean.commit(self._ema)
        s_mean, y_mean = self.s.value, self.y.value
        assert s_mean is not None and y_mean is not None
        new = bfgs(self.HB, *double_damped(self.HB, s_mean, y_mean, self.mu, self.shift))
        self.HB = torch.where(torch.isfinite(new).all(), new, self.HB)  # products of large pairs may overflow

    def _output(self, weights: Tensor, a: Tensor) -> Tensor:
        W = weights.to(a.dtype)
        return _apply(W, a) if a.shape[-1] == W.shape[-1] else _apply(W.mT, a)

    @property
    def ready(self) -> bool:
        return self.factor.ready

    def operator(self) -> LinearOperator:
        if self.HA is None or self.HB is None:
            raise self.no_statistics()
        HA = Dense(self.HA, is_gram=True) if self.HA.dim() == len(self.block.shape) else Diagonal(self.HA)
        return Kronecker(Dense(self.HB, is_gram=True), HA)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {name: H for name, H in (("HA", self.HA), ("HB", self.HB)) if H is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.HA, self.HB = state.get("HA"), state.get("HB")
        self._committed = self._before = None


@dataclass(frozen=True)
class KroneckerBFGS(Curvature):
    """Inverses of Kronecker factors by BFGS; needs an optimizer that runs the second pass (:class:`precond.KBFGS`).

    Layers with a side larger than ``max_dim`` get a diagonal; layers of another shape a 2 x 2 matrix per unit (scale
    and shift) or a diagonal.

    Attributes:
        kind: ``"empirical"``: the pairs are changes of the loss's own gradient.
        mu: Of Powell's damping, in (0, 1).
        initial: Multiple of the identity that the output factor begins with; ``None`` for ``damping ** -0.5``.
        max_dim: Largest side of a layer.
    """

    sums_gradients: ClassVar[bool] = True
    kind: FisherKind = "empirical"
    mu: float = 0.2
    initial: float | None = 1.0
    max_dim: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mu < 1:
            raise ValueError(f"mu must be in (0, 1), got {self.mu}.")
        if self.initial is not None and not self.initial > 0:
            raise ValueError(f"initial must be positive, got {self.initial}.")

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if form != "outer":
            return unit_or_diagonal(block)
        if max(block.shape[-2:]) > self.max_dim:
            return DiagonalEstimator(block)
        return KroneckerBFGSEstimator(block, self.mu, self.initial)
