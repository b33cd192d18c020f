r"""The trace of an operator known by its products.

Letters: A the operator, n unknowns, z a probe of random signs, Q an orthonormal basis; vectors are rows.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from solvers.estimates.estimate import Estimate, Goal, average, conclude, exact, require_finite
from solvers.estimates.leave_one_out import LeaveOneOut, grow_until_good
from solvers.estimates.probes import (
    default_batch,
    flat_product,
    normals,
    orthonormal,
    own_generator,
    require_square,
    signs,
)
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, flag
from solvers.outcome.errors import StructureError
from solvers.outcome.solution import OnFailure
from solvers.precision import without_autocast

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]


@without_autocast
def trace(
    op: LinearOperator,
    method: TraceMethod | None = None,
    *,
    samples: int = 100,
    rtol: float | None = None,
    atol: float | None = None,
    max_samples: int = 10_000,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> Estimate:
    r"""Trace with its standard error, by ``samples`` products.

    * "hutchinson": mean of :math:`z^\top A z`; standard error :math:`\sqrt{2 / m}\,|A - \operatorname{diag} A|_F` for
      m products, no memory beyond them.
    * "hutch++": a third of the products finds a basis Q of what A mostly does, a third takes the trace there exactly,
      Hutchinson estimates the rest. Error :math:`O(1/m)` for semi-definite A; memory ``n m / 3``.
    * "xtrace": uses each vector both ways, by leaving it out of the basis. The smallest error where the spectrum falls
      fast; memory ``2 n m``. Its standard error comes from vectors that are not quite independent.

    >>> from solvers import Function
    >>> op = Function(lambda x: 2 * x, (1000,), symmetric=True)
    >>> trace(op, "hutchinson", samples=10).value
    tensor(2000.)

    Args:
        op: Square operator, symmetric or not.
        method: One of the above. None is exact where the structure gives the trace, or where ``samples`` products with
            unit vectors are all there are; otherwise "hutch++".
        samples: Products to spend; with a tolerance, the fewest.
        rtol: Go on until the standard error is at most ``max(rtol |value|, atol)``.
        atol: See ``rtol``; in units of the trace.
        max_samples: Products at most, with a tolerance.
        batch_size: Vectors per product; None takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; None draws the same ones each time.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        Estimate, 0-d; ``samples`` counts products.

    Raises:
        ValueError: If the operator is not square or an argument is out of range.
        NonFiniteError: If a product holds NaN or infinity.
        NotConvergedError: If the tolerance is not met and ``on_failure`` is "raise".

    References:
        Hutchinson (1990), https://doi.org/10.1080/03610919008812866; Meyer, Musco, Musco and Woodruff (2021),
        algorithm 1, https://arxiv.org/abs/2010.09649; Epperly, Tropp and Webber (2024), section 2.1,
        https://arxiv.org/abs/2301.07825
    """
    require_square(op, "trace")
    choice("method", method, TraceMethod, optional=True)
    flag("progress", progress, optional=True)
    own = own_generator(op, generator)
    goal = Goal(samples, rtol, atol, max_samples, on_failure)
    batch = default_batch(op, batch_size)
    n = op.shape[1]
    if method is None:
        try:
            return exact("trace", op, op.trace())
        except StructureError:
            if n <= samples:
                return _by_unit_vectors(op, batch)
        method = "hutch++"
    generator = own
    match method:
        case "hutchinson":
            return _hutchinson(op, goal, batch, generator, progress)
        case "hutch++":
            return _hutch_plus_plus(op, goal, batch, generator, progress)
        case "xtrace":
            return _xtrace(op, goal, batch, generator, progress)
    raise ValueError(f"method is one of {', '.join(get_args(TraceMethod))}, not {method!r}.")


def _by_unit_vectors(op: LinearOperator, batch: int) -> Estimate:
    product, n = flat_product(op), op.shape[1]
    total = torch.zeros((), dtype=torch.float64, device=op.device)
    for part in torch.eye(n, dtype=op.dtype, device=op.device).split(batch):
        total += (part * product(part)).sum(dtype=torch.float64)
    return exact("trace", op, total, products=n)


def _forms(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each row, float64."""
    return (x * y).sum(-1, dtype=torch.float64)


def _hutchinson(
    op: LinearOperator, goal: Goal, batch: int, generator: torch.Generator, progress: bool | None
) -> Estimate:
    product = flat_product(op)

    def draw(count: int) -> Tensor:
        z = signs(op, count, generator)
        return _forms(z, product(z))

    mean = average(draw, goal, batch, "trace", progress)
    return conclude("trace", op, goal, mean.value, mean.stderr, samples=mean.count, products=mean.count)


def _hutch_plus_plus(
    op: LinearOperator, goal: Goal, batch: int, generator: torch.Generator, progress: bool | None
) -> Estimate:
    product, rank = flat_product(op, batch), goal.samples // 3
    if rank >= op.shape[1]:
        return _by_unit_vectors(op, batch)
    sketch = product(signs(op, rank, generator))
    require_finite("trace", op, sketch)
    basis = orthonormal(sketch)  # (rank, n)
    inside = _forms(basis, product(basis)).sum()

    def draw(count: int) -> Tensor:
        z = signs(op, count, generator)
        z = z - (z @ basis.mT) @ basis
        return inside + _forms(z, product(z))

    mean = average(draw, goal.less(2 * rank), batch, "trace", progress)
    spent = 2 * rank + mean.count
    return conclude("trace", op, goal, mean.value, mean.stderr, samples=spent, products=spent)


def _xtrace(op: LinearOperator, goal: Goal, batch: int, generator: torch.Generator, progress: bool | None) -> Estimate:
    method = LeaveOneOut(op, normals, batch, generator)
    count = max(2, goal.first // 2)
    if count >= op.shape[1]:
        return _by_unit_vectors(op, batch)
    value, stderr = grow_until_good(method, LeaveOneOut.trace, count, goal, "trace", progress)
    return conclude("trace", op, goal, value, stderr, samples=2 * method.count, products=2 * method.count)
