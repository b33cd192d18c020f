"""Kronecker-factored curvature (K-FAC)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import OneHot, Outer, PerSample, Samples, second_moment
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeansEstimator
from curvature.structures.unit import unit_or_diagonal
from curvature.structures.weighted_mean import WeightedMean, waits
from solvers import Dense, Diagonal, Kronecker, LinearOperator
from solvers.precision import widen
from solvers.triangles import add_gram

Sharing = Literal["expand", "reduce", "auto"]
GradientFactor = Literal["second moment", "identity"]
#: Sides up to this length have whole factors however short the other side is: they are decomposed within a second.
LONG = 5000


class KroneckerEstimator(MeansEstimator):
    r"""``B (x) A`` for a layer used at S positions of each example.

    .. math::
        \text{expand:}\quad B = \tfrac{1}{total} \sum_{k,n,s} g g^\top,\quad A = \tfrac{1}{\#(n,s)} \sum_{n,s} a a^\top
        \qquad
        \text{reduce:}\quad g \to \textstyle\sum_s g,\; a \to \tfrac{1}{S} \sum_s a \text{ first, then over } n.

    With ``"auto"`` a dense layer at several positions has ``reduce`` in a pass whose loss has one term for each
    example, since the model then aggregates the positions; so has a convolution whose patches do not overlap, which is
    one. It has ``expand`` where the loss has terms for the positions (language models), or one of several losses of the
    pass has, also one of weight zero, and so have other convolutions and recurrent layers, and all layers where it is
    not known which positions belong to an example.

    All uses of the block count as further positions. Where a matrix is used from both sides (an embedding tied to a
    head), each side has its own Kronecker product and the block is the nearest Kronecker product to their sum.

    With ``gradient_factor="identity"`` B is the identity (see :class:`~curvature.InputKronecker`).

    References:
        Martens and Grosse (2015), https://arxiv.org/abs/1503.05671; Eschenhagen et al. (2023), section 3,
        https://arxiv.org/abs/2311.00636
    """

    structure: ClassVar[str] = "kronecker"
    names = ()  # the sides come with their uses

    def __init__(
        self,
        block: Block,
        sharing: Sharing = "expand",
        max_dim: int = 16384,
        gradient_factor: GradientFactor = "second moment",
    ) -> None:
        super().__init__(block)
        self.sharing = sharing
        self.max_dim = max_dim
        self.gradient_factor = gradient_factor
        # Straight uses give (A, B); flipped uses a second pair.
        self.sides: dict[str, tuple[WeightedMean, WeightedMean]] = {}

    def means(self, also: Iterable[str] = ()) -> dict[str, WeightedMean]:
        for side in dict.fromkeys(name.partition(".")[0] for name in also):
            self.sides.setdefault(side, (WeightedMean(), WeightedMean()))
        return {f"{side}.{i}": mean for side in sorted(self.sides) for i, mean in enumerate(self.sides[side])}

    @property
    def averages_positions(self) -> bool:
        return self.sharing == "reduce"

    @property
    def chooses_sharing(self) -> bool:
        return self.sharing == "auto"

    def chosen_sharing(self, use: Outer | PerSample, aggregated: bool) -> Literal["expand", "reduce"] | None:
        if not self.chooses_sharing or not isinstance(use, Outer):
            return None
        return "reduce" if aggregated and use.dense and not use.is_table else "expand"

    def _reduces(self, samples: Samples, use: Outer) -> bool:
        """Whether the positions of a use are averaged, and their gradients summed, before the moments are taken."""
        known = samples.aggregated and not samples.merge
        return (self.chosen_sharing(use, known) or self.sharing) == "reduce"

    def update(self, samples: Samples) -> None:
        for side in ("straight", "flipped"):
            uses = [use for use in samples.uses if isinstance(use, Outer) and use.flipped == (side == "flipped")]
            if not uses:
                continue
            inputs, gradients = self.sides.get(side) or self._side(side)
            weight = samples.weight if samples.first else 0.0
            for index, use in enumerate(uses):
                reduces = self._reduces(samples, use)
                if samples.first:
                    self._add_inputs(inputs, samples, use, reduces)
                if self.gradient_factor == "second moment":
                    self._add_gradients(gradients, samples, use, reduces, weight if index == 0 else 0.0)
            if self.gradient_factor == "identity" and samples.first:
                g = uses[0].g  # only its size and dtype count
                gradients.add(widen(g.new_zeros((*self.block.shape[:-2], g.shape[-1]))), weight)

    def _side(self, side: str) -> tuple[WeightedMean, WeightedMean]:
        axes = self.matrix_axes(side)
        return self.sides.setdefault(side, (WeightedMean(axes), WeightedMean(axes)))

    def matrix_axes(self, name: str) -> int | None:
        return len(self.block.shape)

    def step_means(self) -> dict[str, WeightedMean]:
        sides = self.sides.items()
        return {f"{s}.{n}": m for s, pair in sides for n, m in zip("AB", pair, strict=True) if m.pending}

    def step_mean(self, name: str) -> WeightedMean:
        side, _, factor = name.partition(".")
        return (self.sides.get(side) or self._side(side))["AB".index(factor)]

    def _add_inputs(self, mean: WeightedMean, samples: Samples, use: Outer, reduces: bool) -> None:
        """Add the second moment of the inputs of a use."""
        times, inputs = samples.times(use), use.inputs
        if isinstance(inputs, Tensor) and use.valid is None and not self.block.shape[:-2]:
            m, d = inputs.shape[-3] * (1 if reduces else inputs.shape[-2]), inputs.shape[-1] + use.ones
            if self.lets_wait(m, d):
                a = widen(inputs)
                rows = a.mean(-2) if reduces else a.flatten(-3, -2)
                own = torch.cat([rows, rows.new_ones(m, 1)], 1) if use.ones else rows.clone()
                mean.add_rows(own, float(m * times), float(times))
                return
        total, count = self._input_moment(samples, use, reduces)
        mean.add(total if times == 1 else total * times, count * times, own=True)

    def _input_moment(self, samples: Samples, use: Outer, reduces: bool) -> tuple[Tensor, Tensor | float]:
        inputs, valid = use.inputs, use.valid
        if isinstance(inputs, OneHot):
            return self._one_hot_moment(inputs, valid, widen(use.g[:0]).dtype, reduces)
        how = reduces, use.ones, self.max_dim
        return samples.moments.of(inputs, valid, how, lambda: self._rows_moment(inputs, valid, use.ones, reduces))

    def _rows_moment(
        self, inputs: Tensor, valid: Tensor | None, ones: bool, reduces: bool
    ) -> tuple[Tensor, Tensor | float]:
        a = widen(inputs)
        if valid is not None:
            valid = valid.to(a.dtype)
            a = a * valid.unsqueeze(-1)
        count: Tensor | float
        if not reduces:
            rows = a.flatten(-3, -2)
            count = float(rows.shape[-2]) if valid is None else valid.sum()
        elif valid is None:
            rows, count = a.mean(-2), float(a.shape[-3])
        else:
            positions = valid.sum(-1)
            rows, count = a.sum(-2) / positions.clamp(min=1).unsqueeze(-1), (positions > 0).sum()
        return self.moment(rows, count if ones else None), count

    def _one_hot_moment(
        self, a: OneHot, valid: Tensor | None, dtype: torch.dtype, reduces: bool
    ) -> tuple[Tensor, Tensor | float]:
        """Frequencies of the ids: the second moment of one-hot rows is diagonal (but not that of their means)."""
        ones = torch.ones(a.index.shape, dtype=dtype, device=a.index.device)
        count = float(a.index.numel()) if valid is None else valid.sum()
        weight = ones if valid is None else valid.to(ones.dtype)
        kept = weight if a.keep is None else weight * a.keep
        if reduces and a.index.shape[-1] > 1:
            rows = kept.new_zeros(a.index.shape[0], a.size).scatter_add_(1, a.index, kept)
            positions = weight.sum(-1)
            return second_moment(rows / positions.clamp(min=1).unsqueeze(-1), self.max_dim), (positions > 0).sum()
        total = kept.new_zeros(a.size).index_add_(0, a.index.reshape(-1), kept.reshape(-1))
        return total, count

    def _add_gradients(
        self, mean: WeightedMean, samples: Samples, use: Outer, reduces: bool, weight: Tensor | float
    ) -> None:
        """Add the second moment of the output gradients of a use."""
        g = widen(use.g)
        rows = g.sum(-2).flatten(-3, -2) if reduces else g.flatten(-4, -2)
        if rows.dim() == 2 and self.lets_wait(*rows.shape):
            mean.add_rows(rows.clone(), weight, 1.0 if samples.factor is None else samples.factor)
        else:
            mean.add(samples.scaled(self.moment(rows)), weight, own=True)

    def lets_wait(self, m: int, d: int) -> bool:
        """Whether m rows of d numbers wait for the step in place of their :meth:`moment`, which is their product."""
        return waits(m, d) and d <= self.max_dim

    def moment(self, rows: Tensor, ones: Tensor | float | None = None) -> Tensor:
        """Second moment of ``rows (*, m, d)``; its diagonal only where d exceeds ``max_dim``.

        With ``ones``, the number of rows that count, that of the rows with a one appended (which is never formed).
        """
        if ones is None:
            return second_moment(rows, self.max_dim)
        d = rows.shape[-1]
        if d + 1 > self.max_dim:
            diagonal = rows.square().sum(-2)
            return torch.cat([diagonal, torch.as_tensor(ones).to(diagonal).expand(*diagonal.shape[:-1], 1)], dim=-1)
        out = rows.new_empty(*rows.shape[:-2], d + 1, d + 1)
        add_gram(out[..., :d, :d], rows, old=0, new=1)
        out[..., :d, d] = out[..., d, :d] = rows.sum(-2)
        out[..., d, d] = ones
        return out

    def count(self, weight: Tensor | float) -> None:
        for _, gradients in self.sides.values():
            if gradients.pending:
                gradients.add(None, weight)

    def parts(self) -> list[WeightedMean | CurvatureEstimator]:
        return [mean for pair in self.sides.values() for mean in pair]

    @property
    def stored(self) -> int:
        return stored_in_factors(self.block, self.max_dim)

    @property
    def ready(self) -> bool:
        return any(inputs.ready for inputs, _ in self.sides.values())

    def operator(self) -> Kronecker:
        products = [self._product(side) for side, (inputs, _) in self.sides.items() if inputs.ready]
        if not products:
            raise self.no_statistics()
        return products[0] if len(products) == 1 else nearest_kronecker(products)

    def _product(self, side: str) -> Kronecker:
        inputs, gradients = (mean.value for mean in self.sides[side])
        assert inputs is not None and gradients is not None
        if self.gradient_factor == "identity":
            gradients = torch.ones_like(gradients)
        dtype = torch.promote_types(inputs.dtype, gradients.dtype)
        stack = len(self.block.shape) - 2
        A, B = (
            Dense(value.to(dtype), is_gram=True) if value.dim() == stack + 2 else Diagonal(value.to(dtype))
            for value in (inputs, gradients)
        )
        return Kronecker(A, B) if side == "flipped" else Kronecker(B, A)

    def state_dict(self) -> dict[str, Any]:
        return {
            side: {"A": inputs.state_dict(), "B": gradients.state_dict()}
            for side, (inputs, gradients) in self.sides.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sides = {}
        for side, pair in state.items():
            means = self._side(side)
            means[0].load_state_dict(pair["A"])
            means[1].load_state_dict(pair["B"])


def stored_in_factors(block: Block, max_dim: int) -> int:
    """Numbers in the Kronecker factors of a block, of which those larger than ``max_dim`` are diagonal."""
    *stack, d_out, d_in = block.shape
    return math.prod(stack) * sum(d * d if d <= max_dim else d for d in (d_out, d_in))


def largest_side(block: Block, max_dim: int, max_ratio: float | None) -> int:
    """Length of the longest side of a block that has a whole factor.

    Decomposing a factor costs the cube of a side, and the products of the layer itself what its two sides multiply to:
    a side that is far longer than the other would take nearly all of a step.

    Args:
        block: The block.
        max_dim: Longest side with a whole factor in any case.
        max_ratio: So many times as long as the other side may a side beyond :data:`LONG` be; ``None`` for any.
    """
    short, long = sorted(block.shape[-2:])
    if max_ratio is None or long <= max(LONG, max_ratio * short):
        return max_dim
    return min(max_dim, max(LONG, short))


def nearest_kronecker(products: list[Kronecker]) -> Kronecker:
    r"""The Kronecker product nearest to a sum of Kronecker products in Frobenius norm.

    The minimiser lies in the span of the factors: with Gram matrices :math:`P_{ij} = \langle B_i, B_j \rangle` and
    :math:`Q_{ij} = \langle A_i, A_j \rangle`, its coefficients are the leading singular pair of
    :math:`P^{1/2} Q^{1/2}`. Factors of positive semi-definite products have non-negative coefficients (Perron), so the
    result is positive semi-definite.

    Args:
        products: Products of two factors each, of equal shapes.

    References:
        Van Loan and Pitsianis (1993), "Approximation with Kronecker products".
    """
    left, right = [[_matrix(p.factors[i]) for p in products] for i in (0, 1)]
    P, Q = _inner(left).double(), _inner(right).double()
    # The leading eigenvector of Q P, whose entries are non-negative, by squaring: after 40 squarings even eigenvalues
    # that agree to ten digits are told apart.
    power = Q @ P
    for _ in range(40):
        power = power / torch.linalg.matrix_norm(power).clamp(min=torch.finfo(P.dtype).tiny)
        power = power @ power
    c = power.sum(1)
    c = c / torch.linalg.vector_norm(c).clamp(min=torch.finfo(P.dtype).tiny)
    # B = sum_i c_i B_i fixed, the best A is sum_j <B, B_j> A_j / <B, B>.
    d = (P @ c) / (c @ P @ c).clamp(min=torch.finfo(P.dtype).tiny)
    B = sum(ci.to(m.dtype) * m for ci, m in zip(c, left, strict=True))
    A = sum(di.to(m.dtype) * m for di, m in zip(d, right, strict=True))
    assert isinstance(B, Tensor) and isinstance(A, Tensor)
    return Kronecker(*(Dense(m) if m.dim() == 2 else Diagonal(m) for m in (B, A)))


def _matrix(factor: LinearOperator) -> Tensor:
    return factor.matrix if isinstance(factor, Dense) else factor.diagonal()


def _inner(matrices: list[Tensor]) -> Tensor:
    """Frobenius inner products of symmetric matrices, some of them given by their diagonals."""
    if any(m.dim() == 1 for m in matrices) and any(m.dim() == 2 for m in matrices):
        for i, m in enumerate(matrices):
            matrices[i] = m if m.dim() == 2 else torch.diag(m)
    return torch.stack([torch.stack([(x * y).sum() for y in matrices]) for x in matrices])


@dataclass(frozen=True)
class KroneckerFisher(Curvature):
    """K-FAC: a Kronecker product per layer.

    Layers of another shape get the best that applies: scale and shift a 2 x 2 matrix per unit, bare parameters a
    diagonal.

    Attributes:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        sharing: ``"expand"`` where each position has a loss of its own (language models), ``"reduce"`` where positions
            are pooled (vision), ``"auto"`` to have each pass choose for each layer, see :class:`KroneckerEstimator`.
        bias: ``"joint"`` (a one appended to the input) or ``"separate"`` blocks.
        max_dim: Factors larger than this are kept as their diagonals.
        max_ratio: So are factors of sides beyond 5,000 that are more than so many times as long as the other side of
            the layer (a bag of 12,000 words into 100 units); ``None`` keeps them whole.
    """

    sharing: Sharing = "expand"
    bias: Literal["joint", "separate"] = "joint"
    max_dim: int = 16384
    max_ratio: float | None = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharing not in get_args(Sharing):
            raise ValueError(f"sharing must be 'expand', 'reduce' or 'auto', got {self.sharing!r}.")
        if self.bias not in ("joint", "separate"):
            raise ValueError(f"bias must be 'joint' or 'separate', got {self.bias!r}.")

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """Whether weight and bias of a layer form one block."""
        return self.bias == "joint"

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if form == "outer":
            return KroneckerEstimator(block, self.sharing, self.largest(block))
        return unit_or_diagonal(block)

    def largest(self, block: Block) -> int:
        """Length of the longest side of a block that has a whole factor."""
        return largest_side(block, self.max_dim, self.max_ratio)
