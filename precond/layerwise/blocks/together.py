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

#: Longest side of a block that is renewed with others. Factorising and inverting 16 matrices together saves their calls
#: alone, 15 microseconds each; of 193 columns and more the work is the same in a loop, and the calls of Python around
#: it, 0.5 ms for each block, are a tenth of it from here on.
LONGEST = 256
#: Numbers in the matrices of one stack: more of them are in no cache when the next step comes to them.
NUMBERS = 2**20


@dataclass(frozen=True)
class Refresh:
    """A refresh of blocks that are due.

    Attributes:
        names: The blocks; those of several have :func:`kin` in common.
        options: Arguments of :meth:`Preconditioner.refresh`, which are the same for all.
    """

    names: list[str]
    options: Mapping[str, Any]


def shared_out(blocks: Mapping[str, Preconditioner], due: Mapping[str, Mapping[str, Any]]) -> list[Refresh]:
    """The refreshes of blocks that are due, in their order; those that can be renewed as one are.

    Args:
        blocks: By name.
        due: Block's name -> arguments of :meth:`Preconditioner.refresh`.
    """
    out: list[Refresh] = []
    open_: dict[object, Refresh] = {}
    for name, options in due.items():
        common = kin(blocks[name], **options)
        last = open_.get(common)
        if (
            common is not None
            and last is not None
            and (len(last.names) + 1) * numbers(blocks[name].estimator.operator()) <= NUMBERS
        ):
            last.names.append(name)
            continue
        out.append(Refresh([name], options))
        open_[common] = out[-1]
    return out


def kin(
    block: Preconditioner,
    damping: Damping,
    *,
    basis: bool = True,
    rows: int | None = None,
    applications: int | None = None,
) -> object:
    """What blocks that are renewed as one have in common; ``None`` for one that is renewed by itself."""
    estimator, form = block.estimator, block.estimator.block
    by_cholesky = type(block) is Preconditioner and type(block.solver) is Cholesky and block.exponent == -1
    if not by_cholesky or not basis or min(form.shape[-2:]) > LONGEST:
        return None
    keeps = type(estimator).refresh_basis is CurvatureEstimator.refresh_basis
    if not keeps or isinstance(estimator, InverseEstimator) or not estimator.ready:
        return None
    operator = estimator.operator()
    common = kind(operator)
    if common is None or longest_side(operator) > LONGEST or not damping.serves_stack(operator):
        return None
    return common, tuple(part.shape for part in form.parts), block.solver, id(damping), rows, applications


def renew(
    blocks: Sequence[Preconditioner],
    damping: Damping,
    *,
    basis: bool = True,
    rows: int | None = None,
    applications: int | None = None,
) -> LinearOperator:
    """Recompute P of blocks that have :func:`kin` in common, as :meth:`Preconditioner.refresh` does of each.

    Returns:
        The metrics of all as one operator on a stack.

    Raises:
        SolverError: If one of them fails.
    """
    damped = damping.in_stack(stacked([block.estimator.operator() for block in blocks]))
    inverse, metric = blocks[0].power_of(damped, rows, applications, in_stack=True)
    for block, own in zip(blocks, unstacked(inverse), strict=True):
        block.take(own)
    return metric
