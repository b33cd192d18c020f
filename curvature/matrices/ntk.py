"""The neural tangent kernel: inner products of the gradients of a model's outputs."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.layers.block import Block
from curvature.layers.samples import Outer, Samples
from curvature.matrices.examples import Examples, inner
from curvature.matrices.jacobian import jacobian
from curvature.model.arguments import checked, inputs, one_of, optional
from curvature.model.data import Output
from curvature.model.kernels import differentiable_kernels
from solvers.precision import widen
from solvers.triangles import gram

NTKMode = Literal["full", "class", "trace"]


@checked(x2=optional(inputs), mode=one_of(NTKMode))
def ntk(
    model: nn.Module,
    x: Any,
    x2: Any = None,
    *,
    mode: NTKMode = "full",
    params: Any = None,
    output: Output | None = None,
    batch_dim: int | None = None,
) -> Tensor:
    r"""Empirical neural tangent kernel of the model's outputs on ``x`` and ``x2``, at the current parameters.

    .. math:: K_{nm}^{cd} = \langle \nabla_\theta f_c(x_n), \nabla_\theta f_d(x_m) \rangle

    One backward pass per output (and position). For layers that see each example once the gradients are never formed:
    their inner products are products of those of inputs and of output gradients.

    Args:
        model: Any module; evaluated in its current mode.
        x: Inputs of N examples.
        x2: Inputs of M examples; ``x`` if left out.
        mode: ``"full"`` keeps both outputs, ``"class"`` the pairs of equal outputs, ``"trace"`` their sum.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        batch_dim: Axis of the output that counts the examples, where it is not the first.

    Returns:
        ``(N, M, *out, *out)``, ``(N, M, *out)`` or ``(N, M)``, where out are the axes of the output but for that of
        the examples.

    Raises:
        ValueError: If the mode is unknown.

    References:
        Jacot, Gabriel and Hongler (2018), https://arxiv.org/abs/1806.07572
    """
    left = jacobian(model, x, params=params, output=output).examples(batch_dim or 0)
    right = left if x2 is None else jacobian(model, x2, params=params, output=output).examples(batch_dim or 0)
    out = left.out_shape
    K = _kernel(model, left, right, same=mode != "full")
    if mode == "trace":
        return K.sum(0)
    if mode == "class":
        return K.permute(1, 2, 0).reshape(*K.shape[1:], *out)
    return K.permute(1, 3, 0, 2).reshape(K.shape[1], K.shape[3], *out, *out)


def _kernel(model: nn.Module, left: Examples, right: Examples, same: bool) -> Tensor:
    """Inner products for all pairs of outputs, ``(K, N, K, M)``, or for equal outputs ``(K, N, M)``."""
    with differentiable_kernels():  # a recomputed (checkpointed) layer needs the kernels of the recorded pass
        rows = left.samples(left.unit_signals())
        columns = rows if right is left else right.samples(right.unit_signals())
    outputs, n, m = math.prod(left.out_shape), left.number, right.number
    shape = (outputs, n, m) if same else (outputs, n, outputs, m)
    total = torch.zeros(shape, dtype=widen(left.output.detach()[:0]).dtype, device=left.output.device)
    by_block = {block: samples for block, samples in columns}
    for block, samples in rows:
        if block in by_block:
            total += _block_kernel(block, samples, by_block[block], outputs, same)
    return total


def _block_kernel(block: Block, left: list[Samples], right: list[Samples], outputs: int, same: bool) -> Tensor:
    uses = _one_position(left), _one_position(right)
    if uses[0] is not None and uses[1] is not None:
        (a, g), (b, h) = uses[0], uses[1]  # inputs (n, i) and (m, i), gradients (K, n, o) and (K, m, o)
        inputs = inner(a, b)
        if same:
            return inner(g, h) * inputs
        return (g.flatten(0, 1) @ h.flatten(0, 1).mT).reshape(outputs, len(a), outputs, len(b)) * inputs[:, None]
    R = _formed(left, block, outputs)
    S = R if right is left else _formed(right, block, outputs)
    if same:
        return inner(R, S)
    rows, columns = R.flatten(0, 1), S.flatten(0, 1)
    products = gram(rows.mT) if S is R else rows @ columns.mT  # one triangle of a symmetric kernel
    return products.reshape(outputs, R.shape[1], outputs, S.shape[1])


def _formed(samples: list[Samples], block: Block, outputs: int) -> Tensor:
    """The gradients of all outputs, ``(K, n, block.numel)``."""
    chunks = [widen(chunk).flatten(1) for entry in samples for chunk in entry.gradients()]
    return torch.cat(chunks).reshape(outputs, -1, block.numel)


def _one_position(samples: list[Samples]) -> tuple[Tensor, Tensor] | None:
    """Inputs ``(n, i)`` and output gradients ``(K, n, o)`` of a layer that saw each example once; None elsewhere."""
    g = []
    for entry in samples:
        uses = entry.aligned()
        use = uses[0]
        if entry.merge or len(uses) > 1 or not isinstance(use, Outer) or not isinstance(use.a, Tensor):
            return None
        if use.positions > 1 or use.a.dim() > 3:
            return None
        g.append(widen(use.g[0, :, 0]))
    assert isinstance(use, Outer)
    return widen(use.rows[:, 0]), torch.stack(g)
