"""The Frobenius norm of an operator known by its products."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.estimates.estimate import Estimate, Goal, Mean, average, conclude, exact
from solvers.estimates.probes import default_batch, flat_product, norm, own_generator, require_operator, signs
from solvers.operators.decompositions import power_of_two
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import flag
from solvers.outcome.errors import StructureError
from solvers.outcome.solution import OnFailure
from solvers.precision import without_autocast


@without_autocast
def frobenius_norm(
    op: LinearOperator,
    *,
    samples: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_samples: int = 10_000,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> Estimate:
    r"""Frobenius norm with its standard error: the root of the mean of :math:`|A z|^2` over vectors z of random signs.

    Works on rectangles and needs no adjoint. The root takes a relative error e of the mean to e / 2.

    Args:
        op: Any operator.
        samples: Products to spend, 100 if left out; with a tolerance, the fewest. If it is given, the norm is estimated
            even where the structure gives it.
        rtol: Go on until the standard error is at most ``max(rtol value, atol)``.
        atol: See ``rtol``; in units of the operator.
        max_samples: Products at most, with a tolerance.
        batch_size: Vectors per product; None takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; None draws the same ones each time.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        Estimate, 0-d; ``samples`` counts products. Exact, with ``samples`` 0, where the structure gives the norm.

    Raises:
        ValueError: If an argument is out of range.
        NonFiniteError: If a product holds NaN or infinity.
        NotConvergedError: If the tolerance is not met and ``on_failure`` is "raise".
    """
    require_operator(op)
    flag("progress", progress, optional=True)
    own = own_generator(op, generator)
    goal = Goal(100 if samples is None else samples, rtol, atol, max_samples, on_failure)
    batch = default_batch(op, batch_size)
    if samples is None:
        try:
            return exact("frobenius_norm", op, op.frobenius_norm())
        except StructureError:
            pass  # no exact norm: estimated below
    product, generator = flat_product(op), own

    unit = torch.ones((), dtype=torch.float64, device=op.device)  # of the first norms, whose squares may overflow

    def draw(count: int) -> Tensor:
        nonlocal unit
        norms = norm(product(signs(op, count, generator)))
        if unit == 1:
            unit = power_of_two(norms[None])[0, 0]
        return (norms / unit).square()

    def root(mean: Mean) -> tuple[Tensor, Tensor]:
        value, stderr = _root(mean)
        return value * unit, stderr * unit

    mean = average(draw, goal, batch, "frobenius_norm", progress, read=root)
    value, stderr = root(mean)
    return conclude("frobenius_norm", op, goal, value, stderr, samples=mean.count, products=mean.count)


def _root(mean: Mean) -> tuple[Tensor, Tensor]:
    value = mean.value.sqrt()
    return value, torch.where(value > 0, mean.stderr / (2 * value), 0)
