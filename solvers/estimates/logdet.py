"""The log-determinant: exact where the structure allows, by stochastic Lanczos quadrature elsewhere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from solvers.estimates.estimate import Estimate, Goal, Mean, average, conclude, exact
from solvers.estimates.lanczos import Quadrature, quadrature, remaining
from solvers.estimates.probes import (
    default_batch,
    flat_product,
    own_generator,
    require_square,
    require_symmetric,
    signs,
)
from solvers.operators.damping import Damping, Tikhonov
from solvers.operators.dense import Dense
from solvers.operators.linear_operator import LinearOperator, Scalar
from solvers.outcome.arguments import choice, flag, whole
from solvers.outcome.errors import NotPositiveDefiniteError, StructureError
from solvers.outcome.solution import OnFailure
from solvers.precision import without_autocast


@without_autocast
def logdet(
    op: LinearOperator,
    damping: Scalar | Damping = 0.0,
    method: Literal["slq"] | None = None,
    *,
    samples: int = 30,
    steps: int = 100,
    rtol: float | None = None,
    atol: float | None = None,
    max_samples: int = 10_000,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> Estimate:
    r"""Logarithm of the determinant of the damped operator, with its standard error.

    Stochastic Lanczos quadrature is the mean of :math:`z^\top \log(C) z` over vectors z of random signs, each by at
    most ``steps`` products. The error has two parts: that of the mean, and that of the quadrature
    (:attr:`Estimate.systematic`, extrapolated from what the last steps changed). Steps end before their number is
    reached once they matter little beside the other part. They grow as the root of the condition, so damping makes the
    estimate cheap.

    Args:
        op: Symmetric positive definite operator, once damped.
        damping: A :class:`~solvers.Damping`; a number ``lam`` means ``C = A + lam I``.
        method: "slq" estimates. None is exact where the structure gives the determinant, or where ``samples`` products
            with unit vectors give the whole matrix.
        samples: Random vectors to spend; with a tolerance, the fewest.
        steps: Products per vector at most.
        rtol: Go on until the standard error is at most ``max(rtol |value|, atol)``.
        atol: See ``rtol``; absolute, a relative error of the determinant.
        max_samples: Vectors at most, with a tolerance.
        batch_size: Vectors per product; None takes what fits in 256 MiB.
        generator: Where the vectors are drawn from; None draws the same ones each time.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        Estimate, 0-d; ``samples`` counts vectors, ``products`` their products.

    Raises:
        ValueError: If the operator is not square or an argument is out of range.
        NotSymmetricError: If it has to be estimated and is not known to be symmetric.
        SingularMatrixError: If the damped operator is seen not to be positive definite.
        NonFiniteError: If a product holds NaN or infinity.
        NotConvergedError: If the tolerance is not met and ``on_failure`` is "raise".

    References:
        Ubaru, Chen and Saad (2017), https://doi.org/10.1137/16M1104974
    """
    require_square(op, "logdet")
    whole("steps", steps)
    choice("method", method, ("slq",), optional=True)
    flag("progress", progress, optional=True)
    batch, own = default_batch(op, batch_size), own_generator(op, generator)
    goal = Goal(samples, rtol, atol, max_samples, on_failure)
    damped = (damping if isinstance(damping, Damping) else Tikhonov(damping))(op)
    n = op.shape[1]
    if method is None or n == 0:
        try:
            return exact("logdet", op, damped.logdet())
        except StructureError:
            if n <= samples:
                return exact("logdet", op, Dense(damped.to_dense()).logdet(), products=n)
    require_symmetric(damped, "logdet")
    product, generator = flat_product(damped), own
    change = Mean()  # what the third and the last quarter of the steps changed
    products = 0

    def settled(rule: Quadrature) -> bool:
        values, changes = rule.apply(lambda theta: _log(theta, rule, damped))
        spread = values.std() * goal.first**-0.5 if len(values) > 1 else values.new_zeros(())
        floor = torch.finfo(values.dtype).eps ** 0.5 * values.mean().abs()
        return bool(remaining(changes.mean(1)) <= torch.maximum(0.05 * spread, floor))

    def draw(count: int) -> Tensor:
        nonlocal products
        rule = quadrature(damped, product, signs(op, count, generator), steps, settled)
        products += count * rule.steps
        values, changes = rule.apply(lambda theta: _log(theta, rule, damped))
        change.add(n * changes.mT)
        return n * values

    mean = average(draw, goal, batch, "logdet", progress)
    return conclude(
        "logdet",
        op,
        goal,
        mean.value,
        mean.stderr,
        samples=mean.count,
        products=products,
        systematic=remaining(change.value),
        mend="Allow more max_samples or steps, more damping, or a larger tolerance.",
    )


def _log(theta: Tensor, rule: Quadrature, op: LinearOperator) -> Tensor:
    """Logarithm of nodes, refusing those that are not positive up to rounding."""
    noise = torch.finfo(op.dtype).eps * rule.nodes.abs().amax()
    bad = (rule.nodes <= noise) & (rule.weights > torch.finfo(torch.float64).eps)
    if bool(bad.any()):
        raise NotPositiveDefiniteError(
            f"logdet of {op!r}: its quadrature has the node {float(rule.nodes[bad].min()):.3g} beside "
            f"{float(rule.nodes.abs().max()):.3g}, so it is not positive definite in {op.dtype}. Use more damping or "
            "float64."
        )
    return theta.clamp(min=torch.finfo(theta.dtype).tiny).log()
