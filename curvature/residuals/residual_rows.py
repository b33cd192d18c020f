"""All residuals of a problem by their rows of layers: products with the Jacobian, and K-FAC of its Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature.model.pullback import pull_back
from curvature.residuals.layer_rows import LayerRows, layer_rows
from curvature.residuals.points import PointwiseResidual
from solvers import Dense, Eigen, Function, Kronecker, LinearOperator


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    r"""K-FAC of one layer, on ``[W, b] (out, in + 1)``, or ``W (out, in)``.

    Residuals of one kind give :math:`B \otimes A`. Several kinds (an equation, a boundary) give the sum
    :math:`\sum_i B_i \otimes A_i`, of which the diagonal is kept in the eigenbasis of
    :math:`\sum_i \operatorname{tr}(A_i) B_i` and :math:`\sum_i \operatorname{tr}(B_i) A_i`.

    Attributes:
        weight: W.
        bias: b, or ``None``.
        kinds: A and B of each kind of residuals, see :meth:`LayerRows.factors`.
    """

    weight: Tensor
    bias: Tensor | None
    kinds: tuple[tuple[Tensor, Tensor], ...]

    def read(self, parts: Mapping[Tensor, Tensor]) -> Tensor:
        """The block of tensors by parameter."""
        if self.bias is None:
            return parts[self.weight]
        return torch.cat([parts[self.weight], parts[self.bias].unsqueeze(1)], 1)

    def write(self, value: Tensor, parts: Mapping[Tensor, Tensor]) -> None:
        """Into tensors by parameter, in place."""
        parts[self.weight].copy_(value[:, : self.weight.shape[1]])
        if self.bias is not None:
            parts[self.bias].copy_(value[:, -1])

    @cached_property
    def eigen(self) -> Eigen:
        """In an eigenbasis, which is exact for one kind."""
        QA = torch.linalg.eigh(sum_of(B.trace() * A for A, B in self.kinds))[1]
        QB = torch.linalg.eigh(sum_of(A.trace() * B for A, B in self.kinds))[1]
        diagonal = sum_of(torch.outer(_diagonal(QB, B), _diagonal(QA, A)) for A, B in self.kinds)
        return Eigen(Kronecker(Dense(QB), Dense(QA)), diagonal.clamp_min(0.0))

    @property
    def operator(self) -> LinearOperator:
        """Without a decomposition where there is one kind."""
        if len(self.kinds) > 1:
            return self.eigen
        A, B = self.kinds[0]
        return Kronecker(Dense(B, is_gram=True), Dense(A, is_gram=True))


class ResidualRows:
    """What residuals of one or several kinds see of the linear layers, as products on the concatenated parameters.

    Args:
        parts: Residuals ``(N, E)`` of each kind, with their rows.
        params: The parameters.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, list[LayerRows]]], params: Sequence[Tensor]) -> None:
        self.parts, self.params = list(parts), list(params)
        self.sizes = [r.numel() for r, _ in parts]
        self.values = torch.cat([r.reshape(-1) for r, _ in parts])
        self.like = torch.cat([p.detach().reshape(-1) for p in params])

    def by_parameter(self, v: Tensor) -> dict[Tensor, Tensor]:
        """The pieces of a flat vector ``(P,)``, as views."""
        pieces = v.split([p.numel() for p in self.params])
        return {p: piece.view_as(p) for p, piece in zip(self.params, pieces, strict=True)}

    def push(self, v: Tensor) -> Tensor:
        """``J v``, ``(P,)`` to ``(R,)``."""
        move = self.by_parameter(v)
        return torch.cat([sum_of(rows.push(move) for rows in found).reshape(-1) for _, found in self.parts])

    def pull(self, w: Tensor) -> Tensor:
        """``J^T w``, ``(R,)`` to ``(P,)``."""
        out = torch.zeros_like(self.like)
        places = self.by_parameter(out)
        for (r, found), part in zip(self.parts, w.split(self.sizes), strict=True):
            for rows in found:
                for p, slope in rows.pull(part.view_as(r)).items():
                    places[p] += slope
        return out

    @cached_property
    def gram(self) -> Function:
        """``J^T J``."""
        like = self.like

        def product(v: Tensor) -> Tensor:
            return self.pull(self.push(v))

        return Function(product, like.shape, symmetric=True, dtype=like.dtype, device=like.device, batched=False)

    @cached_property
    def blocks(self) -> list[KroneckerBlock]:
        """K-FAC of ``J^T J``, a block for each layer; all uses of a layer are kinds of their own."""
        kinds: dict[Tensor, list[tuple[LayerRows, tuple[Tensor, Tensor]]]] = {}
        for _, found in self.parts:
            for rows in found:
                kinds.setdefault(rows.weight, []).append((rows, rows.factors()))
        return [
            KroneckerBlock(weight, several[0][0].bias, tuple(factors for _, factors in several))
            for weight, several in kinds.items()
        ]


def residual_rows(residuals: Sequence[Any], params: Sequence[Tensor]) -> ResidualRows | None:
    """The rows of all residuals; ``None`` where these do not explain a pull-back by autograd.

    Args:
        residuals: :class:`~precond.PointwiseResidual` or others.
        params: The parameters.
    """
    parts = []
    for residual in residuals:
        found = layer_rows(residual, list(params)) if isinstance(residual, PointwiseResidual) else None
        if found is None:
            return None
        parts.append(found)
    biases: dict[int, set[int]] = {}
    for _, rows in parts:
        for r in rows:
            biases.setdefault(id(r.weight), set()).add(id(r.bias))
    if any(len(found) > 1 for found in biases.values()):  # one block with its bias and without
        return None
    all_rows = ResidualRows(parts, params)
    signs = torch.randn(len(all_rows.values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = signs.to(all_rows.values)
    with torch.enable_grad():
        values = torch.cat([residual.value() for residual in residuals])
        slopes = pull_back([values], list(params), [signs], retain_graph=False)
    expected = [torch.zeros_like(p) if s is None else s for p, s in zip(params, slopes, strict=True)]
    wanted = torch.cat([s.reshape(-1) for s in expected])
    far = torch.linalg.vector_norm(all_rows.pull(signs) - wanted)
    precise = torch.finfo(wanted.dtype).eps ** 0.4  # sums over points in another order; a layer left out is far more
    return all_rows if bool(far <= precise * torch.linalg.vector_norm(wanted)) else None


def sum_of(terms: Any) -> Tensor:
    """The sum of at least one tensor."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def _diagonal(Q: Tensor, M: Tensor) -> Tensor:
    """Of ``Q^T M Q``."""
    return ((M @ Q) * Q).sum(0)
