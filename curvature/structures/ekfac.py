"""Eigenvalue-corrected Kronecker factors (EKFAC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import OneHot, Outer, Samples
from curvature.structures.estimator import CurvatureEstimator, Form, MeansEstimator
from curvature.structures.kfac import KroneckerEstimator, KroneckerFisher, Sharing
from curvature.structures.unit import unit_or_diagonal
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, Diagonal, Eigen, Eigh, Kronecker, LinearOperator, diagonalize, from_state, state
from solvers.precision import widen


class EigenbasisEstimator(MeansEstimator):
    r"""``Q diag(s) Q^T`` with the eigenbasis ``Q = Q_B (x) Q_A`` of the Kronecker factors and the best ``s`` for it.

    .. math:: s = \frac{1}{total} \sum_{k,n} \big(Q_B^\top (\textstyle\sum_s g_{kns} a_{ns}^\top) Q_A\big)^2

    is the diagonal of C in that basis, so no other spectrum is closer in Frobenius norm. When the basis turns, the
    spectrum is carried over by the squares of the rotation.

    References:
        George et al. (2018), https://arxiv.org/abs/1806.03884
    """

    structure: ClassVar[str] = "eigenbasis"
    names = ("factors", "spectrum")
    spectrum: WeightedMean

    def __init__(self, block: Block, sharing: Sharing = "expand", max_dim: int = 16384) -> None:
        super().__init__(block)
        self.factors = KroneckerEstimator(block, sharing, max_dim)
        self.basis: Kronecker | None = None
        self._waiting: list[Samples] = []  # the first step's samples, until there is a basis
        self._pass: int | None = None  # of a data set that is seen twice; None in training

    def update(self, samples: Samples) -> None:
        if self._pass != 2:
            self.factors.update(samples)
        if self._pass == 1:
            return
        if self.basis is None:
            self._waiting.append(samples)
        else:
            self.project(samples)

    def project(self, samples: Samples) -> None:
        """Add the samples to the spectrum in the current basis."""
        assert self.basis is not None
        samples = replace(samples, uses=tuple(_widened(use, self.basis.dtype) for use in samples.uses))
        if _turns_gradients(samples):
            inverse = self.basis.adjoint()
            squares = samples.summed(lambda chunk: (inverse @ chunk).square_().sum(0))
        else:
            squares = replace(samples, uses=tuple(self._rotate(use) for use in samples.uses)).square_sum()
        self.spectrum.add(samples.scaled(widen(squares)), samples.weight if samples.first else 0.0)

    def _rotate(self, use: Any) -> Outer:
        """A use in the coordinates of the basis: ``a -> Q_A^T a``, ``g -> Q_B^T g``."""
        assert isinstance(use, Outer) and self.basis is not None
        rows, columns = self.basis.factors
        on_g, on_a = (columns, rows) if use.flipped else (rows, columns)
        g = _rotate_rows(use.g, on_g)
        a: Tensor | OneHot = use.a
        if isinstance(a, Tensor):
            a = _rotate_rows(use.rows, on_a)
        elif isinstance(on_a, Dense):
            a = _rotate_rows(a.dense(g.dtype), on_a)
        return replace(use, a=a, g=g, ones=False)

    def refresh_basis(self, solver: Eigh | None = None) -> None:
        """Take the eigenbasis of the current factors; the spectrum turns with it."""
        previous = self.basis
        eigen = diagonalize(self.factors.operator(), solver or Eigh())
        assert isinstance(eigen, Eigen) and isinstance(eigen.basis, Kronecker)
        basis = eigen.basis
        self.basis = basis
        if previous is not None and self.spectrum.value is not None:
            # s'_j = sum_i (q'_j . q_i)^2 s_i in every dimension.
            turn = Kronecker(
                *(_squared_rotation(new, old) for new, old in zip(basis.factors, previous.factors, strict=True))
            )
            self.spectrum.value = turn @ self.spectrum.value

    def count(self, weight: Tensor | float) -> None:
        self.factors.count(weight)
        if self._pass != 1:
            self.spectrum.count(weight)

    def prepare(self, ema: float) -> bool:
        """Commit the factors; the first ones have the basis that samples wait for."""
        first = self.basis is None
        self.factors.commit(ema)
        if first and self.factors.ready:
            self.refresh_basis()
            self._project_waiting()
        return first

    def commit(self, ema: float) -> None:
        self.prepare(ema)
        self._waiting = []
        self.spectrum.commit(ema)

    def _project_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for samples in waiting:
            self.project(samples)

    def shared(self) -> dict[str, Tensor]:
        """The eigenvectors: each process projects its own samples."""
        if self.basis is None:
            return {}
        left, right = self.basis.factors
        return {"left": _as_tensor(left), "right": _as_tensor(right)}

    def take_shared(self, tensors: Mapping[str, Tensor]) -> None:
        self.basis = Kronecker(*(_as_factor(tensors[name], self.block) for name in ("left", "right")))
        self._project_waiting()

    def begin_passes(self) -> None:
        self._pass = 1

    def next_pass(self) -> bool:
        """Data sets are seen twice: once for the factors, once for the spectrum."""
        if self._pass != 1:
            return False
        self._pass = 2
        self.factors.commit(0.0)
        self.refresh_basis()
        return True

    def discard(self) -> None:
        super().discard()
        self._waiting = []

    @property
    def stored(self) -> int:
        return 2 * self.factors.stored + self.block.numel

    @property
    def ready(self) -> bool:
        return self.basis is not None and self.spectrum.ready

    def operator(self) -> LinearOperator:
        if self.basis is None or self.spectrum.value is None:
            raise self.no_statistics()
        return Eigen(self.basis, self.spectrum.value.to(self.basis.dtype))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self.basis is None else {"basis": state(self.basis)})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        basis = from_state(state["basis"]) if "basis" in state else None
        assert basis is None or isinstance(basis, Kronecker)
        self.basis = basis


def _turns_gradients(samples: Samples) -> bool:
    """Whether to turn the gradients of the examples costs less than to turn the rows that they are made of.

    As for convolutions at many positions: of S positions, rows cost S (d_out^2 + d_in^2) and a gradient
    d_out d_in (d_out + d_in).
    """
    d_out, d_in = samples.block_shape[-2:]
    uses = samples.aligned()
    rows, k = 0, uses[0].signals
    for use in uses:
        if not isinstance(use, Outer) or not isinstance(use.a, Tensor) or len(use.block_shape) != 2:
            return False
        on_g, on_a = (d_in, d_out) if use.flipped else (d_out, d_in)
        rows += use.positions * (k * on_g**2 + on_a**2)
    return rows > k * d_out * d_in * (d_out + d_in)


def _widened(use: Any, dtype: torch.dtype) -> Outer:
    """A use in the precision of the basis: sums over positions round in that of the model, or overflow."""
    return replace(use, a=use.a.to(dtype) if isinstance(use.a, Tensor) else use.a, g=use.g.to(dtype))


def _as_tensor(factor: LinearOperator) -> Tensor:
    return factor.matrix if isinstance(factor, Dense) else factor.diagonal()


def _as_factor(tensor: Tensor, block: Block) -> Dense | Diagonal:
    return Dense(tensor) if tensor.dim() == len(block.shape) else Diagonal(tensor)


def _rotate_rows(rows: Tensor, basis: LinearOperator) -> Tensor:
    """``Q^T r`` for every row of ``rows (*, ..., d)``; an identity basis (a diagonal factor) leaves them alone."""
    if not isinstance(basis, Dense):
        return rows
    Q = basis.matrix
    # The stack of a grouped layer leads in both; the axes between are rows.
    lead = Q.dim() - 2
    flat = rows.reshape(*rows.shape[:lead], -1, rows.shape[-1])
    return (flat.to(Q.dtype) @ Q).reshape(rows.shape)


def _squared_rotation(new: LinearOperator, old: LinearOperator) -> Dense | Diagonal:
    if isinstance(new, Dense) and isinstance(old, Dense):
        return Dense((new.matrix.mT @ old.matrix).square())
    assert isinstance(new, Diagonal)
    return Diagonal(torch.ones_like(new.values))


@dataclass(frozen=True)
class EigenbasisFisher(KroneckerFisher):
    """EKFAC: the eigenbasis of K-FAC with the exact diagonal of C in it. Options as for :class:`KroneckerFisher`."""

    passes: ClassVar[int] = 2

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if form == "outer":
            return EigenbasisEstimator(block, self.sharing, self.largest(block))
        return unit_or_diagonal(block)
