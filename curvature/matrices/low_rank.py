"""The whole matrix from gradients of single examples: its root, or the matrix itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from curvature.estimation.finite import refuse_nonfinite
from curvature.losses.signals import FisherKind, Signals
from curvature.matrices.examples import Examples
from curvature.matrices.problem import Problem
from solvers import Dense, LinearOperator, LowRank
from solvers.precision import widen, working_dtype
from solvers.triangles import gram

#: Bytes that a stored matrix or its root may take.
STORED = 1 << 32


def low_rank(
    problem: Problem,
    kind: FisherKind,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    memory: int = STORED,
) -> LinearOperator:
    r"""The matrix as :math:`U^\top U`, with a row of U for each example and backward signal.

    Exact for ``exact`` (positions x outputs rows per example) and ``empirical`` (positions rows); for ``mc`` the draws
    of an example's positions are added up (one row per draw).

    Args:
        problem: The loss over the data.
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        generator: Source of the draws.
        memory: Bytes that U may take.

    Raises:
        ValueError: If U takes more than ``memory``.
    """
    found: list[Tensor] = []
    size = problem.parameters.size

    def keep(rows: Tensor) -> None:
        found.append(widen(rows))
        nbytes = sum(part.nbytes for part in found)
        if nbytes > memory:
            raise ValueError(
                f"the root of this {size}x{size} matrix has more than {sum(map(len, found))} rows and takes more than "
                f"{nbytes / 2**30:.3g} GiB; memory= allows {memory / 2**30:.3g} GiB. Raise it, take fewer data or "
                "kind='mc', or structure='full', which stores nothing."
            )

    total = each_rows(problem, kind, samples, generator, keep)
    if problem.shares.several:  # every process gets the rows of all
        found = [rows.to(problem.parameters.device) for one in problem.shares.gather(found) for rows in one]
    return LowRank(torch.cat(found) / total**0.5)


def dense(
    problem: Problem,
    kind: FisherKind,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    memory: int = STORED,
) -> LinearOperator:
    """The whole matrix, ``(P, P)``; arguments as for :func:`low_rank`.

    Raises:
        ValueError: If the matrix takes more than ``memory``.
    """
    p = problem.parameters
    dtype = working_dtype(p)
    nbytes = p.size**2 * dtype.itemsize
    if nbytes > memory:
        raise ValueError(
            f"the dense matrix of {p.size} parameters takes {nbytes / 2**30:.3g} GiB; memory= allows "
            f"{memory / 2**30:.3g} GiB. Raise it, restrict the parameters with params=, or take another structure "
            "('full' stores nothing, 'layer' only the blocks of layers)."
        )
    matrix = torch.zeros(p.size, p.size, dtype=dtype, device=p.device)
    total = each_rows(problem, kind, samples, generator, lambda rows: matrix.add_(gram(widen(rows))))
    problem.shares.sum(matrix)
    return Dense(matrix / total)


def each_rows(
    problem: Problem,
    kind: FisherKind,
    samples: int,
    generator: torch.Generator | None,
    use: Callable[[Tensor], object],
) -> Tensor | float:
    """Call ``use`` with rows ``(m, P)`` whose outer products sum to the matrix, in the scale of a sum over terms.

    Returns:
        The divisor of the sum.
    """
    draws = generator or torch.Generator(device=problem.parameters.device).manual_seed(0)
    draws = problem.shares.draws(draws) if kind == "mc" else draws

    def visit(examples: Examples) -> None:
        if kind != "empirical":
            examples.terms.refuse_undefined()
        signals = Signals.of(examples.terms, kind, samples, draws, examples.batch)
        # Rows of several signals are formed together, as many as a sixteenth of a GiB holds.
        per_signal = examples.number * problem.parameters.size * problem.parameters.dtype.itemsize
        for some in chunks(iter(signals), max(1, (1 << 26) // per_signal)):
            rows = examples.gradients(some).flatten(0, 1)
            refuse_nonfinite(rows, "a gradient of the outputs", problem.parameters)
            use(rows)

    return problem.visit(lambda evaluation: visit(Examples.of(evaluation)), "rows of the matrix", recorded=True)


def chunks(signals: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of up to ``size`` signals."""
    some: list[Tensor] = []
    for signal in signals:
        some.append(signal)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
