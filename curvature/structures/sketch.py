"""Inverses of one step's empirical Fisher by a sketched least-squares problem (SENG)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.losses.signals import FisherKind
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form
from curvature.structures.gram import GramEstimator, OuterRows, gram_of
from curvature.structures.inverse import InverseEstimator
from solvers import Cholesky, Dense, LinearOperator, LowRank, Shifted, Tikhonov, Woodbury, power, storable
from solvers.operators.bases import Derived


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Restriction(Derived):
    """Picks rows and columns of ``(*, o, i)`` tensors and multiplies them by a number.

    Args:
        shape_in: Shape of the tensors.
        rows: Indices ``(o',)``.
        columns: Indices ``(i',)``.
        factor: The number, with the dtype of the tensors.
        transposed: True puts ``(*, o', i')`` back, among zeros.
    """

    shape_in: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    factor: Tensor
    transposed: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        picked = (*self.shape_in[:-2], len(self.rows), len(self.columns))
        return picked if self.transposed else tuple(self.shape_in)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.adjoint().in_shape

    @property
    def source(self) -> Tensor:
        return self.factor

    def adjoint(self) -> Restriction:
        return replace(self, transposed=not self.transposed)

    def apply(self, x: Tensor) -> Tensor:
        if not self.transposed:
            return x[..., self.rows, :][..., self.columns] * self.factor
        batch = x.shape[: x.dim() - len(self.shape_in)]
        out = x.new_zeros(*batch, *self.shape_in)
        out[..., self.rows.unsqueeze(-1), self.columns] = x * self.factor
        return out


class SketchedEstimator(GramEstimator, InverseEstimator):
    r"""``(lam I + U^T U)^{-1}`` of one step, with the small system in a sketch of the rows of U.

    With the per-sample gradients as the m rows of U, the inverse of ``g`` is :math:`(g - U^\top b) / \lambda`, where b
    solves the regularised least-squares problem :math:`\min_b |U^\top b - g|^2 + \lambda |b|^2`. It is solved on a
    random choice of coordinates :math:`\Omega`, some outputs times some inputs of the layer, so that the sketched
    gradients come from those coordinates of (a, g) alone:

    .. math:: P g = \tfrac1\lambda \big(g - U^\top (\lambda I + S S^\top)^{-1} S\, \Omega g\big),
              \qquad S = U \Omega^\top, \quad \mathbb E[\Omega^\top \Omega] = I

    Args:
        block: The block.
        size: Number of coordinates kept of each side of a layer; sides up to this size are kept whole.
        seed: Of the choice.

    The authors' code (https://github.com/yangorwell/SENG) picks coordinates in the same way, also without replacement,
    and scales U alike. It differs in that a sketch is multiplied by :math:`d / d'` per side of length d of which d' are
    kept, on both factors of a product, where :math:`\mathbb E[\Omega^\top \Omega] = I` asks for the root; in that
    gradients of few numbers are never sketched; and in that those of convolutions are first cut to a low rank.

    References:
        Yang, Xu, Wen, Chen and Xu (2020), https://arxiv.org/abs/2006.05924
    """

    structure: ClassVar[str] = "sketched low rank"

    def __init__(self, block: Block, size: int, seed: int) -> None:
        super().__init__(block)
        self.size, self.seed = size, seed
        self.draws = 0
        self.inverse: LinearOperator | None = None

    def commit(self, ema: float) -> None:
        self.draws += bool(self.waiting)
        super().commit(ema)

    def improve(self, damping: float) -> None:
        if not damping > 0:
            raise ValueError(f"block {self.block.name}: a sketch needs a positive damping, got {damping}.")
        assert self.root is not None
        restriction = self._restriction(self.root)
        if restriction is None:
            low_rank = LowRank(self.root, gram_of(self.root))
            self.inverse = power(Tikhonov(damping)(low_rank), -1, Woodbury())
            return
        assert isinstance(self.root, OuterRows)
        left, right = self.root.left[..., restriction.rows], self.root.right[..., restriction.columns]
        sketch = OuterRows(left * restriction.factor, right)
        core = power(Dense(sketch.gram(), is_gram=True).add_diagonal(damping), -1, Cholesky(explicit=False))
        correction = self.root.adjoint() @ core @ sketch @ restriction
        self.inverse = Shifted(correction * (-1 / damping), 1 / damping)

    def _restriction(self, of: LinearOperator) -> Restriction | None:
        """This step's coordinates; ``None`` if all are kept."""
        if not isinstance(of, OuterRows):
            return None
        words = f"{self.seed},{self.block.name},{self.draws}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        sides = of.in_shape[-2:]
        if max(sides) <= self.size:
            return None
        rows, columns = (
            torch.randperm(d, generator=generator)[: self.size] if d > self.size else torch.arange(d) for d in sides
        )
        factor = (prod(sides) / (len(rows) * len(columns))) ** 0.5
        return Restriction(
            of.in_shape,
            rows.to(of.device),
            columns.to(of.device),
            torch.tensor(factor, dtype=of.dtype, device=of.device),
        )

    def operator(self) -> LinearOperator:
        if self.inverse is None:
            raise self.no_statistics()
        return self.inverse

    def state_dict(self) -> dict[str, Any]:
        """The number of draws alone: the next step replaces the rest."""
        return {"draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.draws, self.inverse = int(state["draws"]), None


@dataclass(frozen=True)
class SketchedFisher(Curvature):
    """Block-diagonal Fisher of one step, inverted in a sketch. In training only, with ``curvature_ema=0``.

    Attributes:
        kind: ``"empirical"``, ``"mc"`` or ``"exact"``.
        samples: Draws per batch for ``"mc"``.
        size: Coordinates kept of each side of a layer.
        seed: Of the choice of coordinates.
    """

    kind: FisherKind = "empirical"
    size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size must be at least one coordinate, got {self.size}.")

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return SketchedEstimator(block, self.size, self.seed)
