"""Curvature by the Gram matrix of per-sample gradients: low rank, exact, and of the last step alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import CHUNK_ELEMENTS, OneHot, Outer, Samples
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form
from solvers import LinearOperator, LowRank, Rows, storable
from solvers.operators.bases import Derived
from solvers.precision import widen


@storable
@dataclass(frozen=True, eq=False, repr=False)
class OuterRows(Derived):
    r"""Per-sample gradients :math:`\sum_s l_{ms} r_{ms}^\top` of a layer as the rows of a map, never formed.

    Axes: ``*`` stack (groups), ``m`` samples, ``s`` positions, ``o`` and ``i`` the sides of the block.

    Args:
        left: ``(*, m, s, o)``.
        right: ``(*, m, s, i)``.
        transposed: False maps ``(*, o, i)`` to ``(m,)``, True maps ``(m,)`` to ``(*, o, i)``.
    """

    left: Tensor
    right: Tensor
    transposed: bool = False

    @property
    def _block(self) -> tuple[int, ...]:
        return (*self.left.shape[:-3], self.left.shape[-1], self.right.shape[-1])

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.left.shape[-3],) if self.transposed else self._block

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.adjoint().in_shape

    @property
    def source(self) -> Tensor:
        return self.left

    def adjoint(self) -> OuterRows:
        return replace(self, transposed=not self.transposed)

    def apply(self, x: Tensor) -> Tensor:
        left, right = self.left.flatten(-3, -2), self.right.flatten(-3, -2)  # (*, ms, o), (*, ms, i)
        m, s = self.left.shape[-3:-1]
        stack = self.left.dim() - 3
        if self.transposed:
            weights = x.repeat_interleave(s, -1).reshape(*x.shape[:-1], *(1,) * stack, m * s, 1)
            return left.mT @ (weights * right)
        batch = x.shape[: x.dim() - stack - 2]
        products = ((left @ x) * right).sum(-1)  # (*batch, *, ms)
        return products.reshape(*batch, prod(self.left.shape[:stack]), m, s).sum((-3, -1))

    def gram(self) -> Tensor:
        r"""``(m, m)``; for one position :math:`(l l^\top) \circ (r r^\top)`."""
        left, right = self.left, self.right
        m, s, o = left.shape[-3:]
        i = right.shape[-1]
        pairs = m * s * s * (o + i + 1) <= (s + m) * o * i  # instead of forming the gradients
        out = left.new_zeros(m, m)
        if pairs:
            # (l_ms . l_nt) (r_ms . r_nt), summed over s and t; a few samples at a time.
            flat_l, flat_r = left.flatten(-3, -2), right.flatten(-3, -2)
            step = max(1, CHUNK_ELEMENTS // max(1, flat_l[..., 0].numel() * s))
            for start in range(0, m, step):
                rows = slice(start * s, (start + step) * s)
                product = (flat_l[..., rows, :] @ flat_l.mT) * (flat_r[..., rows, :] @ flat_r.mT)
                out[start : start + step] = product.reshape(-1, product.shape[-2] // s, s, m, s).sum((0, 2, 4))
            return (out + out.mT) / 2
        step = max(1, CHUNK_ELEMENTS // max(1, left[..., 0, 0].numel() * i))
        for start in range(0, o, step):
            gradients = left[..., start : start + step].mT @ right  # (*, m, o', i)
            flat = gradients.movedim(-3, 0).flatten(1)
            out += flat @ flat.mT
        return out


def root(samples: Samples) -> LinearOperator:
    """The per-sample gradients of one pass as the rows of an operator from the block's shape to ``(m,)``.

    Copies its tensors: activations may change after the step.
    """
    uses = samples.aligned()
    scale = None if samples.factor is None else samples.factor.sqrt()
    outer = [use for use in uses if isinstance(use, Outer)]
    if len(outer) < len(uses):
        tensors = torch.cat([widen(chunk) for chunk in samples.gradients()])
        return Rows(tensors if scale is None else tensors * scale.to(tensors))
    sides = [_sides(use) for use in outer]
    left, right = (torch.cat([pair[k] for pair in sides], dim=-2) for k in (0, 1))  # uses are further positions
    return OuterRows(left if scale is None else left * scale.to(left), right)


def _sides(use: Outer) -> tuple[Tensor, Tensor]:
    """Left and right factors ``(*, kn, s, d)`` of the block's gradients."""
    g = widen(use.g)  # (*, k, n, s, o)
    a = use.a.dense(g.dtype) if isinstance(use.a, OneHot) else use.rows.to(g.dtype)
    a = a.unsqueeze(-4).expand(*g.shape[:-1], a.shape[-1])
    pair = (g.flatten(-4, -3), a.flatten(-4, -3))
    return pair[::-1] if use.flipped else pair


def join(roots: list[LinearOperator]) -> LinearOperator:
    """The rows of several roots of one block, one after the other."""
    if len(roots) == 1:
        return roots[0]
    outer = [r for r in roots if isinstance(r, OuterRows)]
    if len(outer) < len(roots):
        return Rows(torch.cat([formed(r) for r in roots]))
    positions = max(r.left.shape[-2] for r in outer)

    def side(name: str) -> Tensor:
        padded = []
        for r in outer:
            tensor = getattr(r, name)
            missing = positions - tensor.shape[-2]
            padded.append(torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor)
        return torch.cat(padded, dim=-3)

    return OuterRows(side("left"), side("right"))


def formed(r: LinearOperator) -> Tensor:
    """The rows of a root as a tensor ``(m, *block.shape)``."""
    if isinstance(r, Rows):
        return r.tensors
    assert isinstance(r, OuterRows)
    return (r.left.mT @ r.right).movedim(-3, 0)


def scaled(r: LinearOperator, factor: Tensor | float) -> LinearOperator:
    """A root times a number."""
    if isinstance(r, Rows):
        return Rows(r.tensors * factor)
    assert isinstance(r, OuterRows)
    return OuterRows(r.left * factor, r.right)


def silent(r: LinearOperator, m: int) -> LinearOperator:
    """A root like another one with ``m`` rows of zeros."""
    if isinstance(r, Rows):
        return Rows(r.tensors.new_zeros(m, *r.tensors.shape[1:]))
    assert isinstance(r, OuterRows)
    left, right = (side.new_zeros(*side.shape[:-3], m, 1, side.shape[-1]) for side in (r.left, r.right))
    return OuterRows(left, right)


def gram_of(r: LinearOperator) -> Tensor:
    """Inner products of the rows of a root, ``(m, m)``."""
    if isinstance(r, OuterRows):
        return r.gram()
    flat = formed(r).flatten(1)
    return flat @ flat.mT


def no_average(ema: float, what: str) -> None:
    """Refuse an average over steps."""
    if ema:
        raise ValueError(
            f"{what} holds the gradients of one step, whose number would grow with every step in an average. Set "
            f"curvature_ema=0 (it is {ema})."
        )


class GramEstimator(CurvatureEstimator):
    r"""A block as :math:`U^\top U` with a row of U for each example of the step.

    The Gram matrix :math:`U U^\top` comes from inputs and output gradients, :math:`(a a^\top) \circ (g g^\top)` where
    an example has one position; no per-sample gradient of a layer is formed unless that is cheaper. Its memory is that
    of the activations and their gradients, which are kept until the next step.
    """

    structure: ClassVar[str] = "low rank"

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.root: LinearOperator | None = None
        self.waiting: list[LinearOperator] = []
        self._weight: Tensor | float = 0.0

    def update(self, samples: Samples) -> None:
        self.waiting.append(root(samples))
        if samples.first:
            self._weight = self._weight + samples.weight

    def count(self, weight: Tensor | float) -> None:
        """Count examples that did not reach the block."""
        if self.waiting:
            self._weight = self._weight + weight

    def commit(self, ema: float) -> None:
        no_average(ema, "a Gram matrix")
        if self.waiting:
            self.root = scaled(join(self.waiting), torch.as_tensor(self._weight).rsqrt())
        self.discard()

    def discard(self) -> None:
        self.waiting, self._weight = [], 0.0

    def finite(self) -> Tensor:
        return all_finite(self.waiting)

    @property
    def ready(self) -> bool:
        return self.root is not None

    def operator(self) -> LinearOperator:
        if self.root is None:
            raise self.no_statistics()
        return LowRank(self.root, gram_of(self.root))

    def state_dict(self) -> dict[str, Any]:
        """Empty: the next step replaces all of it, and the inverse keeps the part that is applied until then."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.root = None


def all_finite(roots: list[LinearOperator]) -> Tensor:
    """0-d bool: the rows are free of NaN and inf (one sum per tensor, no wait for the device)."""
    sums = [t.sum() for r in roots for t in r.fields().values() if isinstance(t, Tensor)]
    return torch.isfinite(torch.stack(sums)).all() if sums else torch.tensor(True)


@dataclass(frozen=True)
class GramFisher(Curvature):
    """Block-diagonal Fisher or GGN of one step, each block by the Gram matrix of its per-sample gradients.

    Exact like :class:`LayerFisher`, at a cost that grows with the examples squared instead of the parameters squared.
    In training only, and with ``curvature_ema=0``, since steps are not averaged.
    """

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return GramEstimator(block)
