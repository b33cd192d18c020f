"""The diagonal of an operator known by its products."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from solvers.estimates.estimate import Estimate, Goal, average, conclude, exact
from solvers.estimates.leave_one_out import LeaveOneOut, grow_until_good
from solvers.estimates.probes import default_batch, flat_product, own_generator, require_square, signs
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, flag
from solvers.outcome.errors import StructureError
from solvers.outcome.solution import OnFailure
from solvers.precision import without_autocast

DiagonalMethod = Literal["hutchinson", "xdiag"]


@without_autocast
def diagonal(
    op: LinearOperator,
    method: DiagonalMethod | None = None,
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
    r"""Diagonal with a standard error for each entry, by ``samples`` products.

    * "hutchinson": mean of :math:`z \odot A z` over vectors of random signs; the variance of entry i is
      :math:`\sum_{j \ne i} a_{ij}^2 / m`. Memory for two vectors.
    * "xdiag": exact on a basis of what A mostly does, Hutchinson on the rest, each vector used both ways. Better where
      the spectrum falls fast; memory ``3 n m / 2``, and it multiplies with the adjoint. Its standard errors come from
      vectors that are not quite independent.

    Args:
        op: Square operator, symmetric or not.
        method: One of the above. None is exact where the structure gives the diagonal, or where ``samples`` products
            with unit vectors are all there are; otherwise "hutchinson".
        samples: Products to spend; with a tolerance, the fewest.
        rtol: Go on until the standard errors are at most ``max(rtol |value|, atol)``, both in root mean square.
        atol: See ``rtol``; in units of the operator.
        max_samples: Products at most, with a tolerance.
        batch_size: Vectors per product; None takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; None draws the same ones each time.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        Estimate with ``value`` and ``stderr`` shaped ``in_shape``; ``samples`` counts products.

    Raises:
        ValueError: If the operator is not square or an argument is out of range.
        NonFiniteError: If a product holds NaN or infinity.
        NotConvergedError: If the tolerance is not met and ``on_failure`` is "raise".

    References:
        Bekas, Kokiopoulou and Saad (2007), https://doi.org/10.1016/j.apnum.2007.01.003; Epperly, Tropp and Webber
        (2024), section 2.4, https://arxiv.org/abs/2301.07825
    """
    require_square(op, "diagonal")
    choice("method", method, DiagonalMethod, optional=True)
    flag("progress", progress, optional=True)
    own = own_generator(op, generator)
    goal = Goal(samples, rtol, atol, max_samples, on_failure)
    batch = default_batch(op, batch_size)
    if method is None:
        try:
            return exact("diagonal", op, op.diagonal())
        except StructureError:
            if op.shape[1] <= samples:
                return _by_unit_vectors(op, batch)
        method = "hutchinson"
    generator = own
    match method:
        case "hutchinson":
            product = flat_product(op)

            def draw(count: int) -> Tensor:
                z = signs(op, count, generator)
                return z * product(z)

            mean = average(draw, goal, batch, "diagonal", progress)
            value, stderr, spent = mean.value, mean.stderr, mean.count
        case "xdiag":
            count = max(2, goal.first // 2)
            if count >= op.shape[1]:
                return _by_unit_vectors(op, batch)
            vectors = LeaveOneOut(op, signs, batch, generator, adjoint=True)
            value, stderr = grow_until_good(vectors, LeaveOneOut.diagonal, count, goal, "diagonal", progress)
            spent = 2 * vectors.count
        case _:
            raise ValueError(f"method is one of {', '.join(get_args(DiagonalMethod))}, not {method!r}.")
    value, stderr = value.reshape(op.in_shape), stderr.reshape(op.in_shape)
    return conclude("diagonal", op, goal, value, stderr, samples=spent, products=spent)


def _by_unit_vectors(op: LinearOperator, batch: int) -> Estimate:
    product, n = flat_product(op), op.shape[1]
    parts = torch.eye(n, dtype=op.dtype, device=op.device).split(batch)
    entries = [(part * product(part)).sum(0) for part in parts]  # each unit vector leaves its own entry
    value = torch.stack(entries).sum(0) if entries else torch.zeros(n, dtype=op.dtype, device=op.device)
    return exact("diagonal", op, value.reshape(op.in_shape), products=n)
