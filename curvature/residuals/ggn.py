"""The Gauss-Newton matrix of residuals at points, such as those of a differential equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart, BlockPlace
from curvature.model.parameters import Parameters, Restriction
from curvature.model.pullback import pull_back
from curvature.model.settings import refuse_changes, versions
from curvature.residuals.points import PointwiseResidual
from curvature.residuals.residual_rows import residual_rows
from solvers import BlockDiagonal, Dense, Diagonal, Function, LinearOperator, Segment
from solvers.triangles import gram

ResidualStructure = Literal["full", "dense", "diagonal", "kfac"]


def residual_ggn(
    residuals: PointwiseResidual | Sequence[PointwiseResidual],
    *,
    structure: ResidualStructure = "full",
    params: Restriction | Sequence[Restriction] | None = None,
) -> LinearOperator:
    r"""Gauss-Newton matrix of half a sum of squares of residuals at points, in the given structure.

    .. math:: L(\theta) = \tfrac12 \sum_i \lVert r_i(\theta) \rVert^2, \qquad
        G = \sum_i J_i^\top J_i, \quad J_i = \partial r_i / \partial \theta

    with i over the kinds of residuals (an equation, a boundary), at the parameters of now. It is the counterpart of
    :func:`curvature.ggn` where the loss is not one of the network's outputs, but of their derivatives in the inputs.

    ``structure="kfac"`` has a block for each linear layer. What passes through it has C components (value, slopes,
    second derivatives or their sum): with the rows :math:`\hat z_{nc}` (and the bias's 1 or 0) and the gradients
    :math:`g_{nc} = \partial r_n / \partial y_{nc}` at N points,

    .. math:: G \approx B \otimes A, \qquad A = \frac{1}{NC} \sum_{nc} \hat z_{nc} \hat z_{nc}^\top, \qquad
        B = \sum_{nc} g_{nc} g_{nc}^\top,

    a sum of such products over kinds of residuals and uses of the layer, of which the diagonal in a common eigenbasis
    is kept. Costs one pass over the points.

    >>> import torch
    >>> from precond import PointwiseResidual, laplacian
    >>> u = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    >>> points = torch.rand(50, 2, dtype=torch.float64)
    >>> poisson = PointwiseResidual(u, lambda u, x: laplacian(u, x) + 1, points, 50**-0.5)
    >>> residual_ggn(poisson, structure="kfac")
    BlockDiagonal(2 blocks, 33)

    Args:
        residuals: One kind of residuals, or several, of one model.
        structure: ``"full"`` has products alone; ``"dense"`` is the matrix ``(P, P)``, from all rows of J at once;
            ``"diagonal"`` is its diagonal, likewise; ``"kfac"`` as above.
        params: Names, globs or tensors that restrict the parameters.

    Returns:
        Symmetric positive semi-definite operator on the flat parameter vector.

    Raises:
        TypeError: If a residual is not a :class:`~precond.PointwiseResidual`.
        ValueError: If the structure is unknown, the residuals are of several models, or ``"kfac"`` is asked for where
            linear layers do not hold all parameters, or derivatives come by other functions than
            :func:`~precond.laplacian` and :func:`~precond.directional_derivatives` up to the second order.

    References:
        Dangel, Mueller and Zeinhofer (2024), section 3, https://arxiv.org/abs/2405.15603
    """
    if structure not in get_args(ResidualStructure):
        raise ValueError(f"structure is one of {', '.join(get_args(ResidualStructure))}; got {structure!r}.")
    several = [residuals] if isinstance(residuals, PointwiseResidual) else list(residuals)
    for residual in several:
        if not isinstance(residual, PointwiseResidual):
            raise TypeError(
                "residual_ggn takes residuals at points, precond.PointwiseResidual(model, function, points), not "
                f"{type(residual).__name__}. The matrix of a loss of a model's outputs is curvature.ggn."
            )
    if not several or any(residual.model is not several[0].model for residual in several):
        raise ValueError("residual_ggn takes at least one residual, and all of them of one model.")
    if any(not len(residual.points) for residual in several):
        raise ValueError("residual_ggn takes residuals with at least one point each; leave out those without.")
    parameters = Parameters(several[0].model, params)
    if structure in ("dense", "diagonal"):
        return _formed(several, parameters, structure == "dense")
    rows = residual_rows(several, list(parameters.values()))
    if structure == "full":
        return _products(several, parameters) if rows is None else rows.gram
    if rows is None:
        raise ValueError(
            "structure='kfac' needs a network whose parameters are all in linear layers, with the weight of each bias "
            "among them, and derivatives by "
            "precond.laplacian and precond.directional_derivatives up to the second order; these residuals have "
            "others. Use structure='full' or 'diagonal', or leave parameters out by params=."
        )
    names = {id(p): name for name, p in parameters.items()}
    sizes = {name: p.numel() for name, p in parameters.items()}
    blocks: list[LinearOperator] = []
    places: list[Any] = []
    for found in rows.blocks:
        parts = [_part(names[id(found.weight)], found.weight)]
        parts += [_part(names[id(found.bias)], found.bias.unsqueeze(1))] if found.bias is not None else []
        block = Block("+".join(part.name for part in parts), tuple(parts))
        blocks.append(found.operator)
        places.append(BlockPlace.of(block, parameters.starts, sizes))
    seen = {part.name for place in places for part in place.block.parts}
    for name in parameters:
        if name not in seen:  # of no influence, which was verified
            blocks.append(Diagonal(torch.zeros_like(rows.like[: sizes[name]])))
            places.append(Segment(parameters.starts[name], (sizes[name],)))
    return BlockDiagonal(tuple(blocks), tuple(places), parameters.size)


def _part(name: str, matrix: Tensor) -> BlockPart:
    """A whole parameter as a matrix."""
    shape = tuple(matrix.shape)
    return BlockPart(name, 0, shape, (0, 1), shape)


def _formed(residuals: list[PointwiseResidual], parameters: Parameters, dense: bool) -> LinearOperator:
    """From the Jacobian of one kind of residuals after another."""
    total: Tensor | None = None
    for residual in residuals:
        jacobian = residual.value_and_jacobian(list(parameters.values()))[1]
        term = gram(jacobian) if dense else jacobian.square().sum(0)
        total = term if total is None else total.add_(term)
    assert total is not None
    return Dense(total, is_gram=True) if dense else Diagonal(total)


def _products(residuals: list[PointwiseResidual], parameters: Parameters) -> LinearOperator:
    """By autograd, for what linear layers do not explain: a graph of all residuals, kept for the products."""
    params, before = list(parameters.values()), versions(residuals[0].model)
    with torch.enable_grad():
        values = torch.cat([residual.value() for residual in residuals])
        if not values.requires_grad:
            return Diagonal(torch.zeros(parameters.size, dtype=parameters.dtype, device=parameters.device))
        probe = torch.zeros_like(values, requires_grad=True)
        slopes = pull_back([values], params, [probe], create_graph=True)
        used = [(p, slope) for p, slope in zip(params, slopes, strict=True) if slope is not None]

    def product(v: Tensor) -> Tensor:
        refuse_changes(residuals[0].model, before)
        move = dict(zip(params, v.split([p.numel() for p in params]), strict=True))
        along = [move[p].view_as(slope) for p, slope in used]
        (pushed,) = pull_back([slope for _, slope in used], [probe], along)
        assert pushed is not None
        pulled = pull_back([values], params, [pushed])
        pieces = [torch.zeros_like(p) if s is None else s for p, s in zip(params, pulled, strict=True)]
        return torch.cat([piece.reshape(-1) for piece in pieces])

    shape = (parameters.size,)
    return Function(product, shape, symmetric=True, dtype=parameters.dtype, device=parameters.device, batched=False)
