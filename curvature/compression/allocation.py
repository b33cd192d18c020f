"""Distribute bits or sparsity over layers: where the curvature says they matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from curvature.compression.factors import LayerCurvature, layer_curvature
from curvature.compression.grid import Grid, check_bits
from curvature.compression.layers import Matrix, check_layers, matrices
from curvature.compression.obs import prune_matrix
from curvature.compression.pattern import Pattern
from curvature.compression.rounding import round_matrix
from curvature.model.arguments import Check, a, checked, optional, real
from solvers import BlockDiagonal, Diagonal
from solvers.outcome.arguments import all_of

N = TypeVar("N", int, float)

BITS = (2, 3, 4, 5, 6, 8)
SPARSITIES = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class Allocation:
    """What each layer gets, and the predicted increase of the loss.

    Attributes:
        bits: ``{matrix: bits}``, to be given to :func:`curvature.quantize`; empty where sparsity was distributed.
        sparsity: ``{matrix: share of zeros}``, to be given to :func:`curvature.prune`; empty where bits were.
        predicted: Sum of the predicted increases.
        mean: Mean bits, or mean sparsity, of a weight.
        table: ``{matrix: {choice: predicted increase}}`` of all that could have been chosen.
    """

    bits: Mapping[str, int]
    predicted: float
    mean: float
    table: Mapping[str, Mapping[Any, float]]
    sparsity: Mapping[str, float] = field(default_factory=dict)


def _check_choices(name: str, value: Any) -> Any:
    if not all_of(name, value, check_bits):
        raise ValueError(f"{name} is empty; there is nothing to choose from.")
    return value


def _check_either(name: str, value: Any) -> Any:
    fractions = isinstance(value, (tuple, list)) and any(isinstance(entry, float) for entry in value)
    return all_of(name, value, real(low=0.0, high=1.0, open_high=True)) if fractions else _check_choices(name, value)


_CHECKS: dict[str, Check] = {
    "curvature": a(BlockDiagonal, "an operator of curvature.fisher or curvature.ggn with a block for each layer"),
    "layers": check_layers,
    "grid": optional(a(Grid, "a Grid")),
    "damping": real(low=0.0),
}


@checked(
    **_CHECKS,
    bits=optional(real(low=1.0, high=16.0)),
    sparsity=optional(real(low=0.0, high=1.0, open_low=True, open_high=True)),
    choices=optional(_check_either),
)
def allocate(
    model: nn.Module,
    curvature: BlockDiagonal,
    *,
    bits: float | None = None,
    sparsity: float | None = None,
    choices: Sequence[float] | None = None,
    layers: Iterable[str] | None = None,
    grid: Grid | None = None,
    damping: float = 0.01,
) -> Allocation:
    r"""Bits or sparsity for each layer, so that the predicted increase of the loss is least at a mean over all weights.

    Every matrix is rounded, or pruned, at every choice, which gives its increase
    :math:`\tfrac12 \langle E, C E \rangle`; since C has a block for each layer, increases add up, and the best choice
    is an integer program (a knapsack), solved to its optimum.

    Args:
        model: The trained model.
        curvature: Operator of :func:`curvature.fisher` or :func:`curvature.ggn` in structure ``"kfac"``, ``"ekfac"``,
            ``"foof"`` or ``"diagonal"``, on all parameters of the model.
        bits: Mean bits of a weight, at most; 4 where neither is given.
        sparsity: Mean share of weights that are removed, at least; in place of ``bits``.
        choices: Numbers of bits, or shares, to choose from.
        layers: Names of the parameters; by default those of two or more axes that have factors.
        grid: Symmetry, groups and fit of the grid; its bits do not count.
        damping: Fraction of the factors' mean diagonals.

    Raises:
        ValueError: If both are given, or no choices reach the mean.
    """
    if bits is not None and sparsity is not None:
        raise ValueError("bits and sparsity are distributed one at a time: give one of them.")
    found, read = _layers(model, curvature, layers, damping)
    if sparsity is None:
        numbers = BITS if choices is None else [int(number) for number in choices]
        return allocate_matrices(found, read, 4.0 if bits is None else bits, grid or Grid(), True, numbers)
    table = {m.name: _pruned(m, *read(m), SPARSITIES if choices is None else choices) for m in found}
    sizes = _sizes(found)
    # A bound from below is one from above on the negative shares.
    best = cheapest({name: {-s: cost for s, cost in row.items()} for name, row in table.items()}, sizes, -sparsity)
    chosen = {name: abs(share) for name, share in best.items()}
    return Allocation({}, *_outcome(chosen, table, sizes), table, chosen)


def _pruned(matrix: Matrix, W: Tensor, curvature: LayerCurvature, choices: Iterable[float]) -> dict[float, float]:
    """Predicted increase of the loss when one matrix is pruned, for each share of zeros."""
    values = ((share, prune_matrix(W, curvature, Pattern(share), matrix.free)[0]) for share in choices)
    return {share: curvature.increase(W - value) for share, value in values}


def _sizes(found: Iterable[Matrix]) -> dict[str, int]:
    return {m.name: m.block.shape[-2] * (m.block.shape[-1] - m.free) for m in found}


def _outcome(
    chosen: Mapping[str, float], table: Mapping[str, Mapping[Any, float]], sizes: Mapping[str, int]
) -> tuple[float, float]:
    """The predicted increase of a choice, and its mean over all weights."""
    mean = sum(sizes[name] * choice for name, choice in chosen.items()) / sum(sizes.values())
    return sum(table[name][choice] for name, choice in chosen.items()), mean


@checked(**_CHECKS, bits=_check_choices)
def sensitivity(
    model: nn.Module,
    curvature: BlockDiagonal,
    *,
    bits: Sequence[int] = BITS,
    layers: Iterable[str] | None = None,
    grid: Grid | None = None,
    damping: float = 0.01,
) -> dict[str, dict[int, float]]:
    r"""Predicted increase of the loss for each layer and number of bits, ``{parameter: {bits: increase}}``.

    Arguments as for :func:`allocate`. Each number is :math:`\tfrac12 \langle E, C E \rangle` of the error E that
    :func:`curvature.quantize` would make in that layer.
    """
    found, read = _layers(model, curvature, layers, damping)
    return {matrix.name: increases(matrix, *read(matrix), grid or Grid(), True, bits) for matrix in found}


def _layers(
    model: nn.Module, curvature: BlockDiagonal, layers: Iterable[str] | None, damping: float
) -> tuple[list[Matrix], Callable[[Matrix], tuple[Tensor, LayerCurvature]]]:
    """The matrices of an operator that are weights of layers, and how to read them."""
    parameters = dict(model.named_parameters())
    found = {matrix.name: matrix for matrix in matrices(curvature)}
    if layers is None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        names = [name for name, matrix in found.items() if id(parameters[matrix.block.names[0]]) not in tables]
        factored = [name for name in names if not isinstance(found[name].operator, Diagonal)]
        names = factored or [name for name in names if parameters[found[name].block.names[0]].dim() > 1]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        if unknown := [name for name in names if name not in found]:
            raise ValueError(
                f"layers= names {', '.join(unknown)}, of which the curvature has no matrix; there are "
                f"{', '.join(found)}."
            )
    if not names:
        raise ValueError("the curvature has no matrix of a layer to distribute bits over.")

    def read(matrix: Matrix) -> tuple[Tensor, LayerCurvature]:
        return matrix.read(parameters), layer_curvature(matrix.name, matrix.operator, damping)

    return [found[name] for name in names], read


def increases(
    matrix: Matrix, W: Tensor, curvature: LayerCurvature, grid: Grid, by_activation: bool, choices: Iterable[int]
) -> dict[int, float]:
    """Predicted increase of the loss when one matrix is rounded, for each number of bits."""
    d_in = W.shape[1] - matrix.free
    out = {}
    for number in choices:
        levels = replace(grid, bits=number).levels(W[:, :d_in], curvature.importance[:, :d_in])
        rounded = round_matrix(W, levels, curvature, matrix.free, by_activation)
        out[number] = curvature.increase(W - rounded)
    return out


def allocate_matrices(
    found: Sequence[Matrix],
    read: Callable[[Matrix], tuple[Tensor, LayerCurvature]],
    bits: float,
    grid: Grid,
    by_activation: bool,
    choices: Sequence[int] = BITS,
) -> Allocation:
    """:func:`allocate` on matrices that ``read`` gives with their curvature, one after another."""
    table = {matrix.name: increases(matrix, *read(matrix), grid, by_activation, choices) for matrix in found}
    sizes = _sizes(found)
    best = cheapest(table, sizes, bits)
    return Allocation(best, *_outcome(best, table, sizes), table)


def cheapest(table: Mapping[str, Mapping[N, float]], sizes: Mapping[str, int], budget: float) -> dict[str, N]:
    r"""One choice for each layer with the least sum of costs, under :math:`\sum_l n_l c_l \le budget \sum_l n_l`.

    Raises:
        ValueError: If even the smallest choices exceed the budget.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    names = list(table)
    options = [(row, choice) for row, name in enumerate(names) for choice in table[name]]
    total = sum(sizes.values())
    least = sum(sizes[name] * min(table[name]) for name in names) / total
    slack = 1e-6 * abs(budget)  # rounding of a mean
    if budget + slack < least:
        raise ValueError(f"a mean of {abs(budget):g} is beyond {abs(least):g}, the most that the choices give.")
    costs = np.array([table[names[row]][choice] for row, choice in options])
    scale = costs.max()
    weights = np.array([sizes[names[row]] / total * choice for row, choice in options])
    one = csr_matrix(([1.0] * len(options), ([row for row, _ in options], range(len(options)))))
    found = milp(
        costs / (scale if scale > 0 else 1.0),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(weights[None], -np.inf, budget + slack)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the integer program was not solved: {found.message}")
    return {names[row]: choice for (row, choice), x in zip(options, found.x, strict=True) if x > 0.5}
