"""The dense Hessian of a loss that sees its parameters through one affine map of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from precond.step.graph import second_derivatives


@torch.enable_grad()
def affine_hessian(loss: Callable[[], Tensor], params: list[Tensor], value: Tensor) -> Tensor | None:
    r"""Hessian of a generalized linear model, such as logistic regression, from the Hessian in its outputs.

    For :math:`L = \ell(z, \theta)` with :math:`z_n = W x_n + b` and losses :math:`\ell` in which the rows of z and
    the parameters stand in separate terms (as in a ridge), the block of the outputs i and j is

    .. math:: \nabla^2_{ij} L = \sum_n \frac{\partial^2 \ell}{\partial z_{ni}\, \partial z_{nj}}
        \tilde x_n \tilde x_n^\top + \nabla^2_{\theta\theta} \ell, \qquad \tilde x = (x, 1)

    With N rows, d inputs and C outputs it costs ``N C^2 d^2``, and C products with the Hessian in the outputs, where
    the general way takes a product with the whole Hessian for each of the ``C d`` parameters. Whether the loss has this
    form is found from its graph, and for the rows by a random product.

    Args:
        loss: Evaluates the loss at the current parameters.
        params: The parameters.
        value: The loss that is expected.

    Returns:
        ``(P, P)`` on the concatenated parameters, or ``None`` where the loss is of another form.
    """
    with _Cut(params) as cut:
        again = loss()
    if len(cut.maps) != 1 or not torch.allclose(again.detach(), value):
        return None
    (affine,) = cut.maps
    z = affine.output
    slopes = torch.autograd.grad(again, [z, *params], create_graph=True, allow_unused=True)
    slope, direct = slopes[0], slopes[1:]
    if slope is None or not slope.requires_grad:
        return None
    probe = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    image, *mixed = torch.autograd.grad(slope, [z, *params], probe, retain_graph=True, allow_unused=True)
    if image is None or any(part is not None for part in mixed):
        return None
    outputs = z.shape[-1]
    columns = [  # Hessian of every row times a unit vector, if the rows do not see each other
        torch.autograd.grad(slope, z, torch.eye(outputs).to(z)[i].expand_as(z), retain_graph=True)[0]
        for i in range(outputs)
    ]
    curvature = torch.stack(columns, -1)  # (..., C, C)
    expected = (curvature @ probe.unsqueeze(-1)).squeeze(-1)
    if not torch.allclose(image, expected, rtol=1e-4, atol=1e3 * torch.finfo(z.dtype).eps * float(image.abs().max())):
        return None
    hessian = second_derivatives(direct, params, chunk=512)  # a small graph, so many at once
    affine.add(curvature.reshape(-1, outputs, outputs), params, hessian)
    return hessian


@dataclass(frozen=True, eq=False)
class _Affine:
    """A call of ``F.linear``; its output is a leaf of the graph."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor

    def add(self, curvature: Tensor, params: list[Tensor], hessian: Tensor) -> None:
        """Add ``sum_n H_n (x) x_n x_n^T`` for Hessians ``(N, C, C)`` in the outputs, in place."""
        x = self.input.reshape(-1, self.input.shape[-1]).to(hessian.dtype)
        starts, start = {}, 0
        for p in params:
            starts[id(p)] = start
            start += p.numel()
        place = torch.arange(self.weight.numel(), device=x.device).view_as(self.weight) + starts[id(self.weight)]
        if self.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            places = torch.arange(len(self.bias), device=x.device) + starts[id(self.bias)]
            place = torch.cat([place, places.unsqueeze(1)], 1)  # (C, d + 1)
        outputs, d = place.shape
        weights = curvature.to(hessian.dtype).permute(1, 2, 0).contiguous()  # (C, C, N)
        blocks, columns = hessian.new_empty(outputs, d, outputs, d), x.mT.contiguous()
        for i in range(outputs):
            for j in range(i, outputs):
                blocks[i, :, j] = blocks[j, :, i] = (columns * weights[i, j]) @ x
        place = place.flatten()
        hessian[place.unsqueeze(1), place] += blocks.view(outputs * d, outputs * d)


class _Cut(TorchFunctionMode):
    """Replaces the output of each affine map of something fixed by a leaf with the same values."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.ids = {id(p) for p in params}
        self.maps: list[_Affine] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        known = id(weight) in self.ids and (bias is None or id(bias) in self.ids)
        if not known or x.requires_grad:
            return func(*args, **kwargs)
        output = func(x, weight, bias).detach().requires_grad_()
        self.maps.append(_Affine(x, weight, bias, output))
        return output
