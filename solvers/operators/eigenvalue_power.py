"""Powers of eigenvalues, with the treatment of negative ones and of those that rounding cannot tell from zero."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from solvers.operators.linear_operator import LinearOperator
from solvers.outcome import checks
from solvers.outcome.checks import require
from solvers.outcome.errors import NonFiniteError, NotPositiveDefiniteError, SingularMatrixError

Mode = Literal["plain", "absolute", "clamped"]
MODES: tuple[str, ...] = get_args(Mode)

_SOURCE = "Leave the batch that caused it out of the statistics."
_MENDS = "Use more damping, Eigh('clamped') or float64."


def exact_power(values: Tensor, exponent: float, op: LinearOperator) -> Tensor:
    """``values ** exponent`` for a spectrum given by the user, entry by entry: any nonzero size counts as it is.

    Raises:
        SingularMatrixError: If an entry is zero and the exponent negative.
        NotPositiveDefiniteError: If an entry is negative and the exponent no integer.
        NonFiniteError: If an entry, or a result, is not finite.
    """
    plain = _plain_power(values, exponent)
    return _checked_power(values, exponent, op, values.new_zeros(())) if plain is None else plain


def computed_power(values: Tensor, exponent: float, op: LinearOperator, mode: Mode, floor: float | None) -> Tensor:
    """``values ** exponent`` for eigenvalues computed from a matrix, right up to ``eps * max |values|``.

    Eigenvalues within that distance of zero are zero for a positive exponent; for a negative one "plain" refuses them.
    """
    if values.numel() == 0:
        return values
    noise = torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    if mode == "absolute":
        values = values.abs()
    elif mode == "clamped":
        lowest = noise * values.shape[-1] if floor is None else torch.as_tensor(floor, dtype=values.dtype)
        values = values.clamp(min=lowest.to(values.device))
    elif exponent > 0 and exponent != int(exponent):
        values = torch.where(values.abs() <= noise * values.shape[-1], 0, values)
    return _checked_power(values, exponent, op, noise if mode == "plain" else values.new_zeros(()))


def _plain_power(values: Tensor, exponent: float) -> Tensor | None:
    """``values ** exponent`` where all are positive and all is finite, as told by extremes; ``None`` elsewhere."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(values)
    if wrapped or not values.numel() or values.requires_grad or checks.waits(values):
        return None
    least, most = torch.aminmax(values)
    if not 0 < least.numpy() <= most.numpy() < math.inf:
        return None
    result = values**exponent
    return result if math.isfinite(result.amax().numpy()) else None


def _checked_power(values: Tensor, exponent: float, op: LinearOperator, noise: Tensor) -> Tensor:
    require(
        torch.isfinite(values).all(), lambda: NonFiniteError(f"{op!r} has NaN or infinity in its spectrum. {_SOURCE}")
    )
    if exponent < 0:
        require(
            (values.abs() > noise).all(),
            lambda: SingularMatrixError(
                f"{op!r} is singular: its smallest eigenvalue in magnitude, {float(values.abs().min()):.3g}, cannot be "
                f"told from zero beside {float(values.abs().max()):.3g} in {values.dtype}. {_MENDS}"
            ),
        )
    if exponent != int(exponent):
        require(
            ~(values < 0).any(),
            lambda: NotPositiveDefiniteError(
                f"{op!r} has the eigenvalue {float(values.min()):.3g} and no real power {exponent:g}. {_MENDS}"
            ),
        )
    result = values**exponent
    require(
        torch.isfinite(result).all(),
        lambda: NonFiniteError(f"{op!r} ** {exponent:g} overflows {values.dtype}. Use float64 or more damping."),
    )
    return result
