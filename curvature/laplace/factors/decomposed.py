"""Kronecker-factored curvature by eigenvectors, from which posteriors are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from laplace.utils.matrix import KronDecomposed
from torch import Tensor

from curvature.laplace.factors.tensors import Tensors
from curvature.layers.block import Block, BlockPart, BlockPlace
from solvers import Eigen, LinearOperator, from_state, state
from solvers.operators.kronecker import outer


@dataclass(frozen=True)
class Eigenpiece:
    r"""Eigenvectors and eigenvalues of the curvature of a part of a parameter.

    Attributes:
        part: The part.
        basis: Orthogonal, on tensors of the part's shape.
        values: Eigenvalues of the factors of a Kronecker product, ``(*, d)`` each; or a single tensor of the part's
            shape.
    """

    part: BlockPart
    basis: LinearOperator
    values: tuple[Tensor, ...]


class BlockKronDecomposed(KronDecomposed):
    r"""``s H + diag(delta)`` with H by its eigendecomposition, a number s, and one number delta for each parameter.

    The number s (noise and temperature) and the delta (prior precision) keep their graphs, so that gradients of the
    log-determinant with respect to both are those of

    .. math:: \log\det(s H + \delta) = \sum_i \sum_j \log(s \lambda_{ij} + \delta_i).

    Args:
        tensors: The parameters.
        pieces: The parts of them that have curvature; it is zero elsewhere.
        scale: s, 0-d.
        deltas: ``(number of parameters,)``.
        damping: Add the square roots of delta to both factors of a Kronecker product:
            :math:`(\sqrt{s}\, l_B + \sqrt{\delta}) \otimes (\sqrt{s}\, l_A + \sqrt{\delta})`.
    """

    # KronDecomposed.__init__ is left out on purpose: the pieces keep all that it stores.
    def __init__(
        self,
        tensors: Tensors,
        pieces: Sequence[Eigenpiece],
        scale: Tensor | None = None,
        deltas: Tensor | None = None,
        damping: bool = False,
    ) -> None:
        self.tensors, self.pieces, self.damping = tensors, list(pieces), damping
        like = self.pieces[0].values[0] if self.pieces else torch.empty((), dtype=tensors.dtype)
        self.scale = like.new_ones(()) if scale is None else scale
        self.deltas = like.new_zeros(len(self)) if deltas is None else deltas

    def __len__(self) -> int:
        return len(self.tensors.shapes)

    def _with(self, scale: Tensor, deltas: Tensor) -> Self:
        return type(self)(self.tensors, self.pieces, scale, deltas, self.damping)

    def __add__(self, deltas: Tensor) -> Self:
        """Add one number, or one for each parameter, to the diagonal."""
        self._check_deltas(deltas)
        return self._with(self.scale, self.deltas + deltas.to(self.deltas.device))

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> Self:
        """The matrix times a number."""
        if not isinstance(scalar, Tensor):
            scalar = self.scale.new_tensor(scalar)
        scalar = scalar.to(self.scale.device)
        if scalar.numel() != 1 or scalar.is_complex():
            raise ValueError(f"expected one real number, got a tensor of shape {tuple(scalar.shape)}.")
        scalar = scalar.reshape(())
        return self._with(self.scale * scalar, self.deltas * scalar)

    __rmul__ = __mul__

    def clone(self) -> Self:
        """A matrix of its own: later changes of this one's numbers do not reach it; the eigenvectors are shared."""
        return self._with(self.scale.clone(), self.deltas.clone())

    def detach(self) -> Self:
        """Cut the numbers off their graphs, in place."""
        self.scale, self.deltas = self.scale.detach(), self.deltas.detach()
        return self

    def spectrum(self, piece: Eigenpiece) -> Tensor:
        """Eigenvalues of a piece with scale and delta, in the part's shape."""
        delta = self._delta(piece.part.name)
        if self.damping and len(piece.values) > 1:
            root, shift = self.scale.sqrt(), delta.sqrt()
            return outer(root * values + shift for values in piece.values)
        return self.scale * outer(piece.values) + delta

    def _delta(self, name: str) -> Tensor:
        return self.deltas[self._numbers[name]]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.tensors.shapes)}

    @cached_property
    def _bare(self) -> dict[str, int]:
        """How many entries of each parameter have no curvature."""
        left = dict(self.tensors.sizes)
        for piece in self.pieces:
            left[piece.part.name] -= piece.part.numel
        return {name: count for name, count in left.items() if count}

    def _place(self, piece: Eigenpiece) -> BlockPlace:
        return self.tensors.place(piece.part)

    def logdet(self) -> Tensor:
        """Log-determinant, 0-d."""
        parts = [self.spectrum(piece).log().sum() for piece in self.pieces]
        parts += [count * self._delta(name).log() for name, count in self._bare.items()]
        return torch.stack(parts).sum()

    def _start(self, exponent: float) -> Tensor:
        """The matrix's power without curvature, ``delta ** exponent``; ``(P,)``, to be overwritten."""
        return torch.cat(
            [
                (self._delta(name) ** exponent if name in self._bare else self.deltas.new_zeros(())).expand(size)
                for name, size in self.tensors.sizes.items()
            ]
        )

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """A power of the matrix times vectors.

        Args:
            W: ``(..., P)``.
            exponent: Any real number.

        Returns:
            The products, in the shape and dtype of W.
        """
        x = W.to(self._dtype)
        out = x * self._start(exponent)
        for piece in self.pieces:
            place = self._place(piece)
            turned = piece.basis.adjoint() @ place.gather(x)
            place.scatter(piece.basis @ (self.spectrum(piece) ** exponent * turned), out)
        return out.to(W.dtype)

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        return self.bmm(W, exponent)

    @property
    def _dtype(self) -> torch.dtype:
        return self.pieces[0].basis.dtype if self.pieces else self.tensors.dtype

    def inv_square_form(self, W: Tensor) -> Tensor:
        """``W M^{-1} W^T`` for ``W (batch, k, P)``; ``(batch, k, k)``."""
        return W @ self.bmm(W, -1).mT

    def diag(self, exponent: float = 1) -> Tensor:
        """Diagonal of a power of the matrix, ``(P,)``."""
        out = self._start(exponent).to(self._dtype)
        for piece in self.pieces:
            values = (self.spectrum(piece) ** exponent).to(piece.basis.dtype)
            self._place(piece).scatter(Eigen(piece.basis, values).diagonal(), out)
        return out.to(self.tensors.dtype)

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """A power of the matrix, dense ``(P, P)``; for tests and small models."""
        eye = torch.eye(self.tensors.size, dtype=self.tensors.dtype, device=self.scale.device)
        return self.bmm(eye, exponent)

    def corrected(self, spectra: dict[tuple[str, int], Tensor]) -> Self:
        """The same eigenvectors with other eigenvalues, where there are any.

        Args:
            spectra: By name and start of a part.
        """
        pieces = []
        for piece in self.pieces:
            new = spectra.get((piece.part.name, piece.part.start))
            pieces.append(piece if new is None else replace(piece, values=(new.reshape(piece.part.shape),)))
        return type(self)(self.tensors, pieces, self.scale, self.deltas, self.damping)

    def state_dict(self) -> list[dict[str, Any]]:
        """The pieces as tensors, numbers and names."""
        return [
            {"part": Block(p.part.name, (p.part,)).state(), "basis": state(p.basis), "values": list(p.values)}
            for p in self.pieces
        ]

    @classmethod
    def from_state(cls, tensors: Tensors, saved: Sequence[dict[str, Any]]) -> Self:
        """Restore :meth:`state_dict`; scale and delta are those of a fresh posterior."""
        pieces = [
            Eigenpiece(Block.from_state("", s["part"]).parts[0], from_state(s["basis"]), tuple(s["values"]))
            for s in saved
        ]
        return cls(tensors, pieces)
