"""Steps of least squares that follow the curve on which the residuals keep what the linear model promises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, zeros_like

from precond.closure.residuals import LeastSquares

# Transtrum and Sethna (2012), section 2: the second derivative over a tenth of the step, and 2|a| / |v| <= 0.75.
PROBE = 0.1
BEND = 0.75

# Chords: how many at most; which share of the promised decrease may be missing at the end; the share of the excess that
# each may leave, lest it be the last; and the loss, in units of the one before the step, beyond which none is tried.
CHORDS = 8
MISSING = 0.1
CONTRACTION = 0.7
HOPELESS = 1e3


def curved(
    problem: LeastSquares,
    residuals: Callable[[Tensor], Tensor],
    here: Tensor,
    move: Tensor,
    damping: float,
    predicted: float,
    moving: Tensor,
) -> tuple[Tensor, float]:
    r"""Correct a move so that the residuals become what the linear model promises.

    The model promises :math:`r + J m` after the move m. A curve through it, on which they change in that direction
    alone as far as J can see, begins as a parabola (geodesic acceleration),

    .. math:: c_1 = -\tfrac12 (J^\top J + \lambda D^2)^{-1} J^\top \frac{\partial^2 r}{\partial m^2}

    and is then followed to higher orders by chords, that is by Newton's method for
    :math:`r(\theta + m + c) = r + J m` with the J and the factorisation of the step:

    .. math:: c_{k+1} = c_k - (J^\top J + \lambda D^2)^{-1} J^\top \big(r(\theta + m + c_k) - r - J m\big)

    A chord costs an evaluation of the residuals, and a solve with a factor that stands. They end where nine tenths of
    the promised decrease are there, where the excess of the loss over the promised one falls by less than a third,
    where the loss rises, and where ``|D c| > 0.375 |D m|``, too far for any of this: a parabola that wide is left out.

    Args:
        problem: J, D and their solves.
        residuals: Move to residuals ``(R,)``.
        here: r, those before the step.
        move: m ``(P,)``.
        damping: The one of the move.
        predicted: Promised decrease of half the sum of squares.
        moving: Which numbers may be corrected ``(P,)``: not those of a learning rate of 0, which no step moves.

    Returns:
        c, and half the sum of squares after ``m + c``.

    References:
        Transtrum and Sethna (2012), section 2, https://arxiv.org/abs/1201.5885 (the parabola); Ortega and Rheinboldt
        (1970), section 7.1 (chords)
    """
    change, widest = problem.push(move), 0.5 * BEND * problem.size(move)
    bent = residuals(PROBE * move) - here - PROBE * change
    correction = -problem.fit(bent / PROBE**2, damping) * moving
    narrow = problem.size(correction) <= widest
    correction = correction if narrow else zeros_like(correction)
    promised, there = here + change, residuals(move + correction)
    before, loss = (float(0.5 * r.square().sum()) for r in (here, there))
    for _ in range(CHORDS if narrow and problem.factored else 0):
        excess = loss - (before - predicted)
        if not MISSING * predicted < excess or loss > HOPELESS * before:
            break
        closer = correction - problem.fit(there - promised, damping) * moving
        if not problem.size(closer) <= widest:
            break
        found = residuals(move + closer)
        gained = loss - float(0.5 * found.square().sum())
        if not gained > 0:
            break
        correction, there, loss = closer, found, loss - gained
        if gained < (1 - CONTRACTION) * excess:
            break
    return correction, loss
