"""Residuals at points through the linear layers of a network: exact products with J, and K-FAC's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, vmap
from torch.overrides import TorchFunctionMode

from curvature.residuals.jets import Jet, NestedError, one_pass_only
from curvature.residuals.points import PointwiseResidual
from solvers.outcome.memory import is_out_of_memory
from solvers.triangles import gram


@dataclass(frozen=True)
class LayerRows:
    r"""What the residuals of N points see of one linear layer.

    The layer maps the C components that pass through it (value, slopes, Laplacian:
    :class:`~curvature.residuals.jets.Jet`), :math:`y_{nc} = W z_{nc} + b\, 1_c`, so with
    :math:`g_{nc} = \partial r_n / \partial y_{nc}`

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
            if not seen.calls:
                return None
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
