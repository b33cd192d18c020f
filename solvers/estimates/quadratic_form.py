"""Quadratic forms with an operator, or with a function of it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from solvers.estimates.estimate import Estimate, require_finite
from solvers.estimates.lanczos import Quadrature, quadrature, remaining
from solvers.estimates.probes import flat_product, norm, require_square, require_symmetric
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, instance, number, whole
from solvers.outcome.arguments import function as function_of
from solvers.outcome.solution import OnFailure, not_converged
from solvers.precision import without_autocast, working_dtype


@without_autocast
def quadratic_form(
    op: LinearOperator,
    x: Tensor,
    function: Callable[[Tensor], Tensor] | None = None,
    *,
    steps: int = 100,
    rtol: float | None = None,
    atol: float = 0.0,
    on_failure: OnFailure = "warn",
) -> Estimate:
    r""":math:`x^\top A x`, or :math:`x^\top f(A) x` without forming f(A), for each x of a batch.

    The plain form is one product. With a function, Lanczos from x gives a Gauss quadrature in the spectrum;
    ``lambda s: 1 / s`` solves and multiplies at once, ``torch.log`` or ``torch.sqrt`` need no root of the operator.

    >>> from solvers import Diagonal
    >>> op, x = Diagonal(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 1.0])
    >>> quadratic_form(op, x).value, quadratic_form(op, x, torch.sqrt).value
    (tensor(5.), tensor(3.0000))

    Args:
        op: Square operator; symmetric where there is a function.
        x: Vectors ``(*batch, *in_shape)``.
        function: Acts on eigenvalues, entry by entry on a float64 tensor; None is the identity.
        steps: Products per vector at most.
        rtol: Wanted error relative to the form; None takes ``sqrt(eps)``. All of the batch goes on until each has it.
        atol: Wanted error at least, absolute.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met; never silent.

    Returns:
        Estimate ``(*batch,)`` with 0 samples: nothing is random. Its error is extrapolated from what the last
        steps changed (:func:`~solvers.estimates.lanczos.remaining`); 0 for the plain form.

    Raises:
        ValueError: If the operator is not square.
        NotSymmetricError: If there is a function and the operator is not known to be symmetric.
        NonFiniteError: If the operator holds NaN or infinity, or the function is not finite on its spectrum.
        NotConvergedError: If the tolerance is not met and ``on_failure`` is "raise".

    References:
        Golub and Meurant (2010), Matrices, Moments and Quadrature, chapter 7
    """
    require_square(op, "quadratic_form")
    instance("x", x, Tensor, "a tensor")
    function_of("function", function, optional=True)
    whole("steps", steps)
    number("rtol", rtol, low=0, optional=True)
    number("atol", atol, low=0)
    choice("on_failure", on_failure, OnFailure)
    y = x if function is not None else (op @ x).detach()
    batch = x.shape[: x.ndim - len(op.in_shape)]
    m, n = prod(batch), op.shape[1]
    dtype = working_dtype(op)
    flat = x.detach().reshape(m, n).to(dtype)
    if function is None or m == 0 or n == 0:
        value = (flat * y.reshape(m, n)).sum(-1, dtype=torch.float64)
        require_finite("quadratic_form", op, value)
        zero = torch.zeros(batch, dtype=dtype, device=x.device)
        return Estimate(value.reshape(batch).to(dtype), zero, 0, m, zero)
    require_symmetric(op, "quadratic_form with a function")
    scale = norm(flat).square()
    rtol = torch.finfo(dtype).eps ** 0.5 if rtol is None else rtol

    def form(rule: Quadrature) -> tuple[Tensor, Tensor, bool]:
        value, changes = rule.apply(function)
        value, error = scale * value, scale * remaining(changes)
        return value, error, bool((error <= (rtol * value.abs()).clamp(min=atol)).all())

    rule = quadrature(op, flat_product(op), flat, steps, lambda rule: form(rule)[2])
    value, error, good = form(rule)
    require_finite("quadratic_form", op, value)
    if rule.steps >= n:
        error, good = torch.zeros_like(error), True  # the whole space
    if not good:
        not_converged(
            f"quadratic_form with {op!r} has the error {float(error.max()):.3g} after {rule.steps} steps, more than "
            f"rtol={rtol:g} and atol={atol:g} ask for. Allow more steps, or a larger tolerance.",
            on_failure,
        )
    value, error = (t.reshape(batch).to(dtype) for t in (value, error))
    return Estimate(value, error, 0, m * rule.steps, error)
