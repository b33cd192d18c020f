r"""The last layer in closed form: curvature and Jacobians from its inputs alone.

Where the outputs are :math:`f_n = W \phi_n + b` and the features do not depend on W and b, the Gauss-Newton matrix is
:math:`\sum_n H_n \otimes \phi_n \phi_n^\top` with the Hessian :math:`H_n` of the loss in the outputs, without
backward passes through the model, output by output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvature.laplace.factors.sums import OuterSums
from curvature.layers.block import Block, BlockPart
from curvature.losses import Terms
from curvature.model.trees import tensors_in
from solvers.precision import widen
from solvers.triangles import gram


@dataclass(frozen=True)
class Features:
    """Outputs that are linear in the parameters of the last layer.

    Attributes:
        layer: The layer.
        phi: Its inputs ``(M, ..., d)``.
        output: ``(M, ..., C)``.
    """

    layer: nn.Linear
    phi: Tensor
    output: Tensor

    @classmethod
    def find(cls, model: Any, x: Any) -> Features | None:
        """Run the model; ``None`` unless its outputs come from the last layer on features independent of it.

        Args:
            model: laplace-torch's ``FeatureExtractor``.
            x: Inputs.
        """
        if model.last_layer is None:
            model(x)  # an extractor finds its layer in its first pass
        layer: nn.Linear = model.last_layer
        with _Uses(layer) as uses:
            try:
                output, phi = model.forward_with_features(x)
            except KeyError:  # a copied extractor, whose hook still writes to the one it was copied from
                return None
        if uses.count != 1 or not isinstance(output, Tensor) or output.shape[:-1] != phi.shape[:-1]:
            return None
        with torch.no_grad():
            expected = F.linear(phi, layer.weight, layer.bias)
        if expected.shape != output.shape or not torch.allclose(expected, output, rtol=1e-4, atol=1e-5):
            return None
        return cls(layer, phi, output)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and, if there is one, bias."""
        return list(self.layer.parameters())

    def jacobians(self) -> Tensor:
        """``(M, C, P)``: features times unit matrices; of outputs with more axes, C counts all entries of an example.

        Frozen parameters have no entries.
        """
        M, C = self.output.shape[0], self.output.shape[-1]
        phi = self.phi.reshape(M, -1, self.phi.shape[-1])  # (M, positions, d)
        eye = torch.eye(C, dtype=phi.dtype, device=phi.device)
        parts = []
        if self.layer.weight.requires_grad:
            parts.append(torch.einsum("msd,ck->msckd", phi, eye).flatten(3).flatten(1, 2))
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            parts.append(eye.expand(M, phi.shape[1], C, C).flatten(1, 2))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class OutputHessians:
    r"""Hessians of the summed loss in the outputs of every term, :math:`\operatorname{diag}(p) - p p^\top` or 2.

    Attributes:
        phi: Features of the terms that count, ``(n, d)``, in float32 at least.
        p: Probabilities ``(n, C)``; ``None`` for squared errors.
        outputs: C.
        positions: Terms per example.
    """

    phi: Tensor
    p: Tensor | None
    outputs: int
    positions: int

    @classmethod
    def of(cls, features: Features, lossfunc: Any, terms: Terms) -> OutputHessians | None:
        """Those of the two losses of laplace-torch without further options; ``None`` for others."""
        C = features.output.shape[-1]
        phi = widen(features.phi.detach()).reshape(-1, features.phi.shape[-1])
        positions = len(phi) // max(1, len(features.phi))
        if type(lossfunc) is nn.MSELoss:
            return cls(phi, None, C, positions)
        plain = type(lossfunc) is nn.CrossEntropyLoss and lossfunc.weight is None and not lossfunc.label_smoothing
        last = features.output.dim() - 1
        if not plain or terms.layout.class_axes != (last,):
            return None
        mask = terms.mask.reshape(-1)
        p = widen(features.output.detach()).reshape(-1, C).softmax(-1)
        return cls(phi[mask], p[mask], C, positions)

    def diagonals(self) -> tuple[Tensor, Tensor]:
        """Diagonals of the curvature of weight ``(C, d)`` and bias ``(C,)``."""
        h = torch.full_like(self.phi[:, :1], 2.0).expand(-1, self.outputs) if self.p is None else self.p - self.p**2
        return h.mT @ self.phi.square(), h.sum(0)

    def dense(self, bias: bool) -> Tensor:
        r"""The curvature of weight and, if wanted, bias, ``(P, P)`` with P = C d (+ C).

        :math:`\sum_n \operatorname{diag}(h_n) \otimes a_n a_n^\top - (p_n \otimes a_n)(p_n \otimes a_n)^\top`, where
        :math:`a_n` are the features with a one: n rows in place of one row per term and output.
        """
        n, d, C = len(self.phi), self.phi.shape[1], self.outputs
        h = torch.full_like(self.phi[:, :1], 2.0).expand(n, C) if self.p is None else self.p
        if self.p is None:
            total = self.phi.new_zeros(C * (d + bias), C * (d + bias))
        else:
            rows = (self.p.unsqueeze(2) * self.phi.unsqueeze(1)).flatten(1)
            total = gram(torch.cat([rows, self.p], dim=1) if bias else rows).neg_()
        weight = total[: C * d, : C * d].view(C, d, C, d)
        for c in range(C):
            weight[c, :, c] += gram(h[:, c : c + 1].sqrt() * self.phi)
        if bias:
            mixed = self.phi.mT @ h  # (d, C)
            total[: C * d, C * d :].view(C, d, C).diagonal(dim1=0, dim2=2).add_(mixed)
            total[C * d :, : C * d].view(C, C, d).diagonal(dim1=0, dim2=1).add_(mixed)
            total[C * d :, C * d :].diagonal().add_(h.sum(0))
        return total

    def sums(self, max_dim: int, bias: bool) -> OuterSums:
        """The sums of Kronecker factors; with a one appended to the features for a bias."""
        if self.outputs > max_dim:
            B = self.diagonals()[1]
        elif self.p is None:
            B = 2.0 * len(self.phi) * torch.eye(self.outputs, dtype=self.phi.dtype, device=self.phi.device)
        else:
            B = torch.diag(self.p.sum(0)) - gram(self.p)
        a = torch.cat([self.phi, torch.ones_like(self.phi[:, :1])], dim=1) if bias else self.phi
        A = gram(a) if a.shape[1] <= max_dim else a.square().sum(0)
        return OuterSums({"straight": (B, A, float(len(a)))})


def block_of(layer: nn.Linear, weight: str, bias: str | None = None) -> Block:
    """The block of a linear layer, as recorded passes name it."""
    C, d = layer.weight.shape
    parts = [BlockPart(weight, 0, (C, d), (0, 1), (C, d))]
    if bias is not None:
        parts.append(BlockPart(bias, 0, (C,), (0,), (C, 1)))
    return Block("+".join(part.name for part in parts), tuple(parts))


class _Uses(TorchFunctionMode):
    """Counts the functions that compute something from the parameters of a layer, or from views of them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.parameters = {id(p) for p in layer.parameters()}
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = any(id(t) in self.parameters or id(t._base) in self.parameters for t in tensors_in((args, kwargs)))
        if used and any(True for _ in tensors_in(result)):  # reading a shape or dtype does not count
            self.count += 1
        return result
