"""Residuals at points through the linear layers of a network: exact products with J, and its K-FAC."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, vmap
from torch.overrides import TorchFunctionMode

from precond.closure.jets import Jet, NestedError, one_pass_only
from precond.closure.residuals import LeastSquares, PointwiseResidual
from precond.step.graph import flatten, unflatten
from solvers import CG, Function, LinearOperator, Tikhonov
from solvers.outcome.memory import is_out_of_memory
from solvers.triangles import gram


@dataclass(frozen=True)
class LayerRows:
    r"""What the residuals of N points see of one linear layer.

    The layer maps the C components that pass through it (value, slopes, Laplacian: :class:`~precond.closure.jets.Jet`),
    :math:`y_{nc} = W z_{nc} + b\, 1_c`, so with :math:`g_{nc} = \partial r_n / \partial y_{nc}`

    .. math:: \frac{\partial r_n}{\partial W} = \sum_c g_{nc} z_{nc}^\top, \qquad
        \frac{\partial r_n}{\partial b} = \sum_c 1_c\, g_{nc}

    Attributes:
        weight: W ``(out, in)``.
        bias: b ``(out,)``, or ``None``.
        z: ``(N, C, in)``.
        g: ``(N, E, C, out)`` for residuals of E entries.
        ones: :math:`1_c`, 1 for values and 0 for derivatives, ``(C,)``.
    """

    weight: Tensor
    bias: Tensor | None
    z: Tensor
    g: Tensor
    ones: Tensor

    def push(self, move: dict[Tensor, Tensor]) -> Tensor:
        """``J v``, ``(N, E)``."""
        y = self.z @ move[self.weight].mT
        if self.bias is not None:
            y = y + self.ones.unsqueeze(1) * move[self.bias]
        return (self.g.flatten(2) @ y.flatten(1).unsqueeze(2)).squeeze(2)

    def pull(self, w: Tensor) -> dict[Tensor, Tensor]:
        """``J^T w`` of ``(N, E)``, by parameter."""
        weighted = (w.unsqueeze(1) @ self.g.flatten(2)).view(self.z.shape[0], self.z.shape[1], -1)
        out = {self.weight: weighted.flatten(0, 1).mT @ self.z.flatten(0, 1)}
        if self.bias is not None:
            out[self.bias] = torch.einsum("nco,c->o", weighted, self.ones)
        return out

    def factors(self) -> tuple[Tensor, Tensor]:
        r"""K-FAC's factors of ``J^T J``, with the bias as a last input.

        .. math:: A = \frac{1}{N C} \sum_{nc} \hat z_{nc} \hat z_{nc}^\top, \qquad B = \sum_{nc} g_{nc} g_{nc}^\top
        """
        z = self.z
        if self.bias is not None:
            z = torch.cat([z, self.ones.view(1, -1, 1).expand(len(z), -1, 1)], 2)
        rows = z.flatten(0, 1)
        return gram(rows) / len(rows), gram(self.g.flatten(0, 2))


def layer_rows(residual: PointwiseResidual, params: list[Tensor]) -> tuple[Tensor, list[LayerRows]] | None:
    """Residuals ``(N, E)``, and what they see of each use of a linear layer; ``None`` where they use something else.

    Args:
        residual: The residual.
        params: The parameters that are trained.
    """
    model = residual.model
    values = {name: p.detach() for name, p in model.named_parameters()}
    trained = {id(p) for p in params}
    owners: dict[int, Tensor] = {id(values[name]): p for name, p in model.named_parameters() if id(p) in trained}
    try:
        with one_pass_only():
            with torch.no_grad(), _Probed(owners) as seen:
                residual.at(values, residual.points[0])
            blank = [torch.zeros_like(call.output) for call in seen.calls]

            def probed(probes: list[Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
                with _Probed(owners, probes) as now:
                    r = residual.at(values, x)
                return r, (r, [call.input for call in now.calls])

            g, (r, z) = vmap(jacrev(probed, has_aux=True), in_dims=(None, 0))(blank, residual.points)
    except NestedError:
        return None
    except RuntimeError as error:  # inside other transforms of the caller's, whose tensors do not outlive them
        if is_out_of_memory(error):
            raise
        return None
    rows = [
        LayerRows(call.weight, call.bias, inputs.detach(), slopes.detach(), call.ones)
        for call, inputs, slopes in zip(seen.calls, z, g, strict=True)
    ]
    return r.detach(), rows


@dataclass(frozen=True, eq=False)
class _Call:
    weight: Tensor
    bias: Tensor | None
    input: Tensor  # (C, in)
    output: Tensor  # (C, out)
    ones: Tensor


class _Probed(TorchFunctionMode):
    """Notes the linear maps whose weights are parameters, and adds a probe to the components of each one's output."""

    def __init__(self, owners: dict[int, Tensor], probes: list[Tensor] | None = None) -> None:
        super().__init__()
        self.owners, self.probes = owners, probes
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return out
        x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
        if id(weight) not in self.owners:
            return out
        jet = type(out) is Jet
        before, after = (x.parts, out.parts) if jet else (x.unsqueeze(0), out.unsqueeze(0))
        positions = before[0].numel() // before.shape[-1]
        ones = before.new_zeros(len(before), dtype=weight.dtype)
        ones[0] = 1
        flat = after.reshape(-1, after.shape[-1])
        call = _Call(
            self.owners[id(weight)],
            None if bias is None else self.owners.get(id(bias)),
            before.reshape(-1, before.shape[-1]),
            flat,
            ones.repeat_interleave(positions),
        )
        self.calls.append(call)
        if self.probes is None:
            return out
        moved = (flat + self.probes[len(self.calls) - 1]).view(after.shape)
        return Jet(moved) if jet else moved[0]


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
