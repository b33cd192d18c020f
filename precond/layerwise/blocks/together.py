"""Small blocks of one shape, whose inverses are renewed as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvature import CurvatureEstimator
from curvature.structures.inverse import InverseEstimator
from precond.layerwise.blocks.preconditioner import Preconditioner
from solvers import Cholesky, Damping, LinearOperator
from solvers.operators.stacked import kind, longest_side, numbers, stacked, unstacked

#: Longest side of a matrix that is renewed with others. Factorising and inverting 16 of them together saves their calls
#: alone, 15 microseconds each; from 129 columns on a loop takes as long. The calls of Python around that take 0.5 ms
#: for each block, a fifth of its work at 193 columns; and large stacks cost memory.
LONGEST = 224
#: Numbers in the matrices of one stack: so many, and what is made of them, stay in a cache.
NUMBERS = 2**18


@dataclass(frozen=True)
class BlockRefresh:
    """A refresh of blocks that are due.

    Attributes:
        names: The blocks; those of several have :func:`kin` in common.
        options: Arguments of :meth:`Preconditioner.refresh`, which are the same for all.
        operators: C of each, where there are several.
    """

    names: list[str]
    options: Mapping[str, Any]
    operators: list[LinearOperator]


def shared_out(blocks: Mapping[str, Preconditioner], due: Mapping[str, Mapping[str, Any]]) -> list[BlockRefresh]:
    """The refreshes of blocks that are due, in their order; those that can be renewed as one are.

    Args:
        blocks: By name.
        due: Block's name -> arguments of :meth:`Preconditioner.refresh`.
    """
    out: list[BlockRefresh] = []
    unfilled: dict[object, BlockRefresh] = {}
    for name, options in due.items():
        operator = small_operator(blocks[name], **options)
        if operator is None:
            out.append(BlockRefresh([name], options, []))
            continue
        common = kin(blocks[name], operator, **options)
        last = unfilled.get(common)
        if last is None or (len(last.names) + 1) * numbers(operator) > NUMBERS:
            last = unfilled[common] = BlockRefresh([], options, [])
            out.append(last)
        last.names.append(name)
        last.operators.append(operator)
    return out


def small_operator(
    block: Preconditioner, damping: Damping, *, basis: bool = True, **options: Any
) -> LinearOperator | None:
    """C of a block that may be renewed with others of its kind; ``None`` of one that is renewed by itself."""
    estimator, form = block.estimator, block.estimator.block
    by_cholesky = type(block) is Preconditioner and type(block.solver) is Cholesky and block.exponent == -1
    if not by_cholesky or not basis or min(form.shape[-2:]) > LONGEST:
        return None
    keeps = type(estimator).refresh_basis is CurvatureEstimator.refresh_basis
    if not keeps or isinstance(estimator, InverseEstimator) or not estimator.ready:
        return None
    operator = estimator.operator()
    served = kind(operator) is not None and damping.serves_stack(operator)
    return operator if served and longest_side(operator) <= LONGEST else None


def kin(
    block: Preconditioner,
    operator: LinearOperator,
    damping: Damping,
    *,
    rows: int | None = None,
    applications: int | None = None,
    **options: Any,
) -> object:
    """What blocks that are renewed as one have in common, given C of one."""
    columns = tuple(part.shape for part in block.estimator.block.parts)
    return kind(operator), columns, block.solver, id(damping), rows, applications


def renew(
    blocks: Sequence[Preconditioner],
    operators: Sequence[LinearOperator],
    damping: Damping,
    *,
    rows: int | None = None,
    applications: int | None = None,
    **options: Any,
) -> LinearOperator:
    """Recompute P of blocks that have :func:`kin` in common, as :meth:`Preconditioner.refresh` does of each.

    Returns:
        The metrics of all as one operator on a stack.

    Raises:
        SolverError: If one of them fails.
    """
    inverse, metric = blocks[0].power_of(damping.in_stack(stacked(operators)), rows, applications, in_stack=True)
    for block, own in zip(blocks, unstacked(inverse), strict=True):
        block.take(own)
    return metric
