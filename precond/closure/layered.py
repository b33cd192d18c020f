"""Least squares of residuals at points, by products from the rows of layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature.residuals.layer_rows import LayerRows, layer_rows
from curvature.residuals.points import PointwiseResidual
from precond.closure.residuals import LeastSquares
from precond.step.graph import flatten, unflatten
from solvers import CG, Function, LinearOperator, Tikhonov


def layered(residuals: list[Any], params: list[Tensor], solver: CG) -> LayeredLeastSquares | None:
    """The problem by the rows of layers; ``None`` where these do not explain a pull-back by autograd.

    Args:
        residuals: :class:`~precond.PointwiseResidual` or others.
        params: The parameters.
        solver: Solves.
    """
    parts = []
    for residual in residuals:
        found = layer_rows(residual, params) if isinstance(residual, PointwiseResidual) else None
        if found is None:
            return None
        parts.append(found)
    biases: dict[int, set[int]] = {}
    for _, rows in parts:
        for r in rows:
            biases.setdefault(id(r.weight), set()).add(id(r.bias))
    if any(len(found) > 1 for found in biases.values()):  # one block with its bias and without
        return None
    problem = LayeredLeastSquares(parts, params, solver)
    signs = torch.randn(len(problem.values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = signs.to(problem.values)
    with torch.enable_grad():
        values = torch.cat([residual.value() for residual in residuals])
        slopes = torch.autograd.grad(values, params, signs, allow_unused=True)
    expected = flatten({p: torch.zeros_like(p) if s is None else s for p, s in zip(params, slopes, strict=True)})
    far = torch.linalg.vector_norm(problem.pull(signs) - expected)
    precise = torch.finfo(expected.dtype).eps ** 0.4  # sums over points in another order; a layer left out is far more
    return problem if bool(far <= precise * torch.linalg.vector_norm(expected)) else None


class LayeredLeastSquares(LeastSquares):
    r"""By conjugate gradients with exact products from layers, preconditioned by K-FAC.

    The K-FAC of residuals of several kinds (an equation, a boundary) is a sum of Kronecker products,
    :math:`\sum_i A_i \otimes B_i`. It is diagonalised approximately, in the eigenbasis of
    :math:`\sum_i \operatorname{tr}(B_i) A_i` and :math:`\sum_i \operatorname{tr}(A_i) B_i`, which is exact for one
    kind, and the damping is added to the diagonal.

    Args:
        parts: Residuals of each kind, with their rows.
        params: The parameters.
        solver: Solves.

    References:
        Dangel, Mueller and Zeinhofer (2024), section 3, https://arxiv.org/abs/2405.15603
    """

    def __init__(self, parts: list[tuple[Tensor, list[LayerRows]]], params: list[Tensor], solver: CG) -> None:
        self.parts, self.params, self.solver = parts, params, solver
        self.sizes = [r.numel() for r, _ in parts]
        self.values = torch.cat([r.reshape(-1) for r, _ in parts])
        self.like = flatten({p: p.detach() for p in params})

    def push(self, v: Tensor) -> Tensor:
        move = unflatten(v, self.params)
        return torch.cat([sum_of(rows.push(move) for rows in found).reshape(-1) for _, found in self.parts])

    def pull(self, w: Tensor) -> Tensor:
        """``J^T w``."""
        out = {p: torch.zeros_like(p) for p in self.params}
        for (r, found), part in zip(self.parts, w.split(self.sizes), strict=True):
            for rows in found:
                for p, slope in rows.pull(part.view_as(r)).items():
                    out[p] += slope
        return flatten(out)

    def fit(self, target: Tensor, damping: float) -> Tensor:
        solver = replace(self.solver, preconditioner=self.preconditioner(damping)) if damping > 0 else self.solver
        return solver.solve(Tikhonov(damping)(self.operator), self.pull(target))

    def size(self, v: Tensor) -> float:
        return float(v.norm())

    @cached_property
    def operator(self) -> Function:
        """``J^T J``."""

        def product(x: Tensor) -> Tensor:
            rows = [self.pull(self.push(row)) for row in x.reshape(-1, x.shape[-1])]
            return torch.stack(rows).view_as(x)

        shape = (len(self.like),)
        return Function(product, shape, symmetric=True, dtype=self.like.dtype, device=self.like.device)

    @cached_property
    def blocks(self) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]]:
        """Of each layer: weight, bias, eigenbases of its inputs and outputs, and the diagonal ``(out, in)`` in them."""
        kinds: dict[Tensor, list[tuple[LayerRows, Tensor, Tensor]]] = {}
        for _, found in self.parts:
            for rows in found:
                kinds.setdefault(rows.weight, []).append((rows, *rows.factors()))
        out = []
        for weight, several in kinds.items():
            QA = torch.linalg.eigh(sum_of(B.trace() * A for _, A, B in several))[1]
            QB = torch.linalg.eigh(sum_of(A.trace() * B for _, A, B in several))[1]
            diagonal = sum_of(torch.outer(_diagonal(QB, B), _diagonal(QA, A)) for _, A, B in several)
            out.append((weight, several[0][0].bias, QA, QB, diagonal.clamp_min(0.0)))
        return out

    def preconditioner(self, damping: float) -> LinearOperator:
        """The inverse of the damped K-FAC."""

        def apply(x: Tensor) -> Tensor:
            return torch.stack([self._solved(row, damping) for row in x.reshape(-1, x.shape[-1])]).view_as(x)

        shape = (len(self.like),)
        return Function(apply, shape, symmetric=True, dtype=self.like.dtype, device=self.like.device)

    def _solved(self, v: Tensor, damping: float) -> Tensor:
        parts = unflatten(v, self.params)
        out = {p: part / damping for p, part in parts.items()}
        for weight, bias, QA, QB, diagonal in self.blocks:
            V = parts[weight] if bias is None else torch.cat([parts[weight], parts[bias].unsqueeze(1)], 1)
            solved = QB @ ((QB.mT @ V @ QA) / (diagonal + damping)) @ QA.mT
            out[weight] = solved[:, : weight.shape[1]]
            if bias is not None:
                out[bias] = solved[:, -1]
        return flatten(out)


def sum_of(terms: Any) -> Tensor:
    """The sum of at least one tensor."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def _diagonal(Q: Tensor, M: Tensor) -> Tensor:
    """Of ``Q^T M Q``."""
    return ((M @ Q) * Q).sum(0)
