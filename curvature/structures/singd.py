"""Structured inverse-free natural gradients: factors of the inverse that are updated by products alone (SINGD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.structures.estimator import CurvatureEstimator, Form, MeansEstimator
from curvature.structures.inverse import InverseEstimator
from curvature.structures.kfac import KroneckerEstimator, KroneckerFisher, Sharing
from curvature.structures.unit import unit_or_diagonal
from solvers import Dense, Diagonal, Kronecker, LinearOperator, storable
from solvers.operators.bases import Derived, SelfAdjoint
from solvers.triangles import add_symmetric, gram

FactorStructure = Literal["dense", "diagonal", "block", "triangular"]


@storable(name="Blocks")
@dataclass(frozen=True, eq=False, repr=False)
class DiagonalBlocks(SelfAdjoint, Derived):
    """A block-diagonal matrix on ``(*stack, size)`` with symmetric blocks ``(*stack, count, b, b)``.

    Args:
        matrix: The blocks; rows and columns beyond ``size`` in the last one are zero.
        size: d.
    """

    matrix: Tensor
    size: int

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (*self.matrix.shape[:-3], self.size)

    @property
    def source(self) -> Tensor:
        return self.matrix

    def apply(self, x: Tensor) -> Tensor:
        pieces = cut(x, self.matrix.shape[-1]).unsqueeze(-1)  # (*, count, b, 1)
        return (self.matrix @ pieces).flatten(-3)[..., : self.size]


def cut(x: Tensor, b: int) -> Tensor:
    """``(*, d)`` to ``(*, count, b)``, padded with zeros."""
    d = x.shape[-1]
    count = -(-d // b)
    return torch.nn.functional.pad(x, (0, count * b - d)).unflatten(-1, (count, b))


class BlockMoments(KroneckerEstimator):
    """K-FAC's factors, of which only the blocks along the diagonal are formed.

    Args:
        block: The block.
        sharing: ``"expand"`` or ``"reduce"``.
        max_dim: Factors larger than this are diagonal.
        size: Size of the blocks; ``None`` for one of all.
    """

    def __init__(self, block: Block, sharing: Sharing, max_dim: int, size: int | None) -> None:
        super().__init__(block, sharing, max_dim)
        self.size = size

    def matrix_axes(self, name: str) -> int | None:
        return len(self.block.shape) + 1

    def block_size(self, d: int) -> int:
        """Size of the blocks of a factor of size d."""
        return 1 if d > self.max_dim else d if self.size is None else min(self.size, d)

    def lets_wait(self, m: int, d: int) -> bool:
        return False  # their product has other axes than the blocks

    def moment(self, rows: Tensor, ones: Tensor | float | None = None) -> Tensor:
        d = rows.shape[-1]
        b = self.block_size(d + (ones is not None))
        if b == d + (ones is not None) <= self.max_dim:
            return super().moment(rows, ones).unsqueeze(-3)
        if ones is not None:
            rows = torch.nn.functional.pad(rows, (0, 1))  # the slot of the one
        pieces = cut(rows, b).movedim(-2, -3)  # (*, count, m, b)
        out = gram(pieces)
        if ones is not None:
            last, slot = divmod(d, b)
            sums = pieces[..., last, :, :].sum(-2)
            out[..., last, slot, :] = out[..., last, :, slot] = sums
            out[..., last, slot, slot] = ones
        return out

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Left and right factors as blocks ``(*, count, b, b)``, one pair for uses from each side."""
        found = []
        for side, (inputs, gradients) in self.sides.items():
            if inputs.value is not None and gradients.value is not None:
                A, B = self._as_blocks(inputs.value), self._as_blocks(gradients.value)
                found.append((A, B) if side == "flipped" else (B, A))
        return found

    def _as_blocks(self, value: Tensor) -> Tensor:
        stack = len(self.block.shape) - 2
        if value.dim() == stack + 1:  # frequencies of ids
            return value.unsqueeze(-1).unsqueeze(-1)
        if value.dim() == stack + 2:  # means of one-hot rows
            b = self.block_size(value.shape[-1])
            pieces = cut(cut(value, b).movedim(-3, -1), b)  # (*, count, b, count, b), columns first
            return pieces.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return value


class SINGDEstimator(MeansEstimator, InverseEstimator):
    r"""``C^{-1} = (L L^T) (x) (K K^T)``, with L and K in a structure and moved by products alone.

    For :math:`C = B \otimes A + \lambda I` a step is, for K with :math:`H_K = K^\top A K` and :math:`H_L = L^\top B L`,

    .. math::
        m_K \leftarrow \alpha m_K + \tfrac12 \Pi\Big(\tfrac{\operatorname{tr} H_L}{d_L} H_K
        + \lambda \tfrac{\operatorname{tr} L^\top L}{d_L} K^\top K - I\Big), \qquad
        K \leftarrow K (I - \beta\, m_K),

    and the same for L with the parts exchanged. :math:`\Pi` projects to the structure (for triangular factors twice
    the lower triangle off the diagonal), which the update keeps. :math:`\beta` is divided by :math:`\|m\|_\infty`
    where that exceeds one. With ``coupled=False`` the weights are 1: each factor inverts its own damped moment (IKFAC).
    Where a matrix is used from both sides (an embedding tied to a head) the terms of both Kronecker products add up.

    Args:
        block: The block.
        moments: Estimate of the factors' blocks.
        triangular: Lower triangular blocks.
        lr: :math:`\beta`.
        momentum: :math:`\alpha`.
        initial: Multiple of the identity that :math:`C^{-1}` begins with.
        coupled: False for IKFAC.

    References:
        Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner and Makhzani (2024), sections 3 and 4,
        https://arxiv.org/abs/2312.05705
    """

    structure: ClassVar[str] = "kronecker, inverse"
    names = ("moments",)

    def __init__(
        self,
        block: Block,
        moments: BlockMoments,
        triangular: bool,
        lr: float,
        momentum: float,
        initial: float,
        coupled: bool,
    ) -> None:
        super().__init__(block)
        self.moments, self.triangular = moments, triangular
        self.lr, self.momentum, self.initial, self.coupled = lr, momentum, initial, coupled
        self.factors: tuple[Tensor, Tensor] | None = None  # L, K
        self.velocity: tuple[Tensor, Tensor] | None = None

    def update(self, samples: Samples) -> None:
        self.moments.update(samples)

    def improve(self, damping: float) -> None:
        pairs = self.moments.pairs()
        if len(pairs) > 1 and not self.coupled:
            raise ValueError(
                f"block {self.block.name} is used from both sides (an embedding tied to a head), so its curvature is a "
                "sum of two Kronecker products, which IKFAC does not define. Use SINGD with coupled=True."
            )
        # One block size for each side: the other one replaces that of ids, which are diagonal.
        pairs = _aligned(pairs)
        if self.factors is None:
            scale = self.initial**0.25
            self.factors = (self._diagonal(pairs[0][0], 0, scale), self._diagonal(pairs[0][1], 1, scale))
            self.velocity = (torch.zeros_like(self.factors[0]), torch.zeros_like(self.factors[1]))
        assert self.velocity is not None
        dtype = pairs[0][0].dtype  # another one than before, where the model went on in another precision
        L, K = (factor.to(dtype) for factor in self.factors)
        velocities = [velocity.to(dtype) for velocity in self.velocity]
        sizes = self.block.shape[-2:]
        # H = F^T (M F): the first product gives the trace, of the second, which is symmetric, one triangle is computed.
        images = [[left @ L for left, _ in pairs], [right @ K for _, right in pairs]]
        moved, velocity = [], []
        if self.coupled:
            traces = [[_inner(x, F) for x in images] for images, F in zip(images, (L, K), strict=True)]
            squares = [_inner(F, F) for F in (L, K)]
        for index, factor in enumerate((L, K)):
            d = sizes[1 - index]
            image = images[index][0]
            if self.coupled:
                weights = [trace / d for trace in traces[1 - index]]
                image = sum(
                    (w * x for w, x in zip(weights[1:], images[index][1:], strict=True)), image.mul_(weights[0])
                )
                shift = damping * squares[1 - index] / d
            else:
                shift = factor.new_full((), damping)
            m = self._moved_towards(velocities[index], factor, image.addcmul_(factor, shift))
            m.diagonal(dim1=-2, dim2=-1).sub_(self._entries(factor, index, 0.5))
            size = torch.linalg.vector_norm(m, 1, dim=-1).amax((-1, -2)).clamp(min=1)[..., None, None, None]
            moved.append(torch.addcmul(factor, self.lr / size, factor @ m, value=-1))
            velocity.append(m)
        self.factors, self.velocity = (moved[0], moved[1]), (velocity[0], velocity[1])

    def _diagonal(self, like: Tensor, side: int, value: float) -> Tensor:
        """A multiple of the identity in blocks like others; the padding of the last block is zero and stays zero."""
        return torch.diag_embed(self._entries(like, side, value))

    def _entries(self, like: Tensor, side: int, value: float) -> Tensor:
        """Its diagonal ``(*, count, b)``."""
        return cut(like.new_full((*like.shape[:-3], self.block.shape[side - 2]), value), like.shape[-1])

    def _moved_towards(self, velocity: Tensor, factor: Tensor, image: Tensor) -> Tensor:
        r""":math:`\alpha m + \tfrac12 \Pi(F^\top Y)` for a symmetric product, in memory of its own."""
        if not self.triangular:
            return add_symmetric(velocity.clone(), factor, image, old=self.momentum, new=0.5)
        total = add_symmetric(torch.empty_like(velocity), factor, image, old=0, new=0.5)
        return (total.tril() + total.tril(-1)).add_(velocity, alpha=self.momentum)

    def operator(self) -> LinearOperator:
        if self.factors is None:
            raise self.no_statistics()
        return Kronecker(*(_square(F, d) for F, d in zip(self.factors, self.block.shape[-2:], strict=True)))

    def state_dict(self) -> dict[str, Any]:
        out = super().state_dict()
        if self.factors is not None and self.velocity is not None:
            out |= {"L": self.factors[0], "K": self.factors[1], "mL": self.velocity[0], "mK": self.velocity[1]}
        return out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.factors = (state["L"], state["K"]) if "L" in state else None
        self.velocity = (state["mL"], state["mK"]) if "L" in state else None


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """``tr(X^T Y)`` over all blocks of each element of a stack, with three axes to broadcast over them."""
    return (x * y).sum((-3, -2, -1), keepdim=True)


def _square(factor: Tensor, d: int) -> LinearOperator:
    matrix = gram(factor.mT)
    if matrix.shape[-3] == 1:
        return Dense(matrix[..., 0, :, :], is_gram=True)
    if matrix.shape[-1] == 1:
        return Diagonal(matrix[..., 0, 0])
    return DiagonalBlocks(matrix, d)


def _aligned(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Moments of each side in blocks of the same size, of several pairs."""
    sides = []
    for moments in zip(*pairs, strict=True):
        b = max(m.shape[-1] for m in moments)
        sides.append([m if m.shape[-1] == b else torch.diag_embed(cut(m[..., 0, 0], b)) for m in moments])
    return list(zip(*sides, strict=True))


@dataclass(frozen=True)
class SINGDFisher(KroneckerFisher):
    """Inverse Kronecker factors by structured inverse-free updates; see :class:`SINGDEstimator`.

    Attributes:
        factor: ``"dense"``, ``"diagonal"``, ``"block"`` or ``"triangular"``.
        block_size: Size of the blocks for ``"block"``.
        factor_lr: Step length of the factors.
        factor_momentum: Momentum of the factors.
        initial: Multiple of the identity that the inverse begins with.
        coupled: False for IKFAC.
    """

    factor: FactorStructure = "dense"
    block_size: int = 32
    factor_lr: float = 0.05
    factor_momentum: float = 0.5
    initial: float = 1.0
    coupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor not in get_args(FactorStructure):
            raise ValueError(f"structure must be one of {', '.join(get_args(FactorStructure))}, got {self.factor!r}.")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}.")
        if not 0 < self.factor_lr < 1:
            raise ValueError(f"factor_lr must be in (0, 1), or a factor may become singular; got {self.factor_lr}.")
        if not 0 <= self.factor_momentum < 1:
            raise ValueError(f"factor_momentum must be in [0, 1), got {self.factor_momentum}.")
        if not self.initial > 0:
            raise ValueError(f"initial must be positive, got {self.initial}.")

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if form != "outer":
            return unit_or_diagonal(block)
        size = {"diagonal": 1, "block": self.block_size}.get(self.factor)
        moments = BlockMoments(block, self.sharing, self.largest(block) if size is None else self.max_dim, size)
        return SINGDEstimator(
            block,
            moments,
            self.factor == "triangular",
            self.factor_lr,
            self.factor_momentum,
            self.initial,
            self.coupled,
        )
