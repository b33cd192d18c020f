r"""Levenberg-Marquardt in a trust region, for many problems at once, within bounds.

References:
    Moré (1978), "The Levenberg-Marquardt algorithm: implementation and theory"; Transtrum and Sethna (2012), geodesic
    acceleration, https://arxiv.org/abs/1201.5885
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.fitting.robust import LOSSES, Rho, cost, reweighted
from precond.fitting.variables import Variables

_ACCEPT = 1e-4  # of the predicted reduction
_PROBE = 0.1  # how far along the step its second derivative is taken
# The acceleration over the step, at most half of this. Transtrum and Sethna (section 2) take 0.75; on the regressions
# of NIST 0.1 solves all 27 from both starts, and 0.3 to 1.5 all but one start.
_BEND = 0.1


@dataclass(frozen=True)
class Settings:
    """Tolerances and options of a fit; see :func:`precond.least_squares`."""

    lower: Tensor
    upper: Tensor
    scale: Tensor | None
    rho: Rho
    f_scale: float
    ftol: float
    xtol: float
    gtol: float
    max_nfev: int
    acceleration: bool
    report: Callable[[int, Tensor, Tensor], None] | None


@dataclass
class State:
    """All problems: rows of unknowns, residuals, and why each one stopped (``-2`` while it has not)."""

    x: Tensor
    r: Tensor
    J: Tensor
    cost: Tensor
    status: Tensor
    njev: int = 0


def fit(variables: Variables, settings: Settings, x: Tensor, r: Tensor) -> State:
    """Fit every problem until it meets a tolerance.

    Args:
        variables: The problems.
        settings: Tolerances and options.
        x: Where they begin, ``(problems, n)``.
        r: The residuals there.

    Raises:
        TypeError: If the residuals do not depend on the unknowns.
    """
    s = settings
    J = variables.jacobian(x)
    if not bool(J.any()):
        variables.require_dependence(x)
    state = State(x, r, J, cost(r, s.rho, s.f_scale), torch.full((len(x),), -2, device=x.device), 1)
    broken = ~(r.isfinite().all(1) & J.flatten(1).isfinite().all(1))
    state.status[broken] = -1
    D = _diagonal(s, J, None)
    size = torch.linalg.vector_norm(D * x, dim=1)
    radius = torch.where(size > 0, size, 1.0)
    step = 0
    while bool((state.status == -2).any()):
        r, J = reweighted(state.r, state.J, s.rho, s.f_scale)
        J = torch.where((state.status == -1)[:, None, None], 0.0, J)
        r = torch.where((state.status == -1)[:, None], 0.0, r)
        D = _diagonal(s, J, D)
        held = at_bound(state.x, (J.mT @ r.unsqueeze(-1)).squeeze(-1), s.lower, s.upper)
        cosine = optimality(J, r, held != 0)
        _stop(state, cosine <= s.gtol, 1)
        if s.report is not None:
            s.report(step, state.cost, cosine)
        svd = _decomposed(torch.where((held != 0)[:, None, :], 0.0, J / D.unsqueeze(1)), state.status == -2)
        radius = _try(variables, s, state, r, J, D, held != 0, svd, radius)
        step += 1
        if variables.calls >= s.max_nfev:
            _stop(state, state.status == -2, 0)
    return state


def _try(
    variables: Variables,
    s: Settings,
    state: State,
    r: Tensor,
    J: Tensor,
    D: Tensor,
    held: Tensor,
    svd: tuple[Tensor, ...],
    radius: Tensor,
) -> Tensor:
    """Steps with smaller and smaller radii until each running problem has accepted one, or stopped."""
    waiting = state.status == -2
    x, moved = state.x.clone(), state.r.clone()
    now = state.cost.clone()
    while bool(waiting.any()) and variables.calls < s.max_nfev:
        p, lam = _within(svd, r, radius)
        p = torch.where(held, 0.0, p)
        if s.acceleration and s.rho is LOSSES["linear"]:  # robust weights bend the residuals as well
            p = p + _bend(variables, s, state, D, svd, J, p, lam, held)
        there = (state.x + p / D).clamp(s.lower, s.upper)
        there = torch.where(waiting.unsqueeze(1), there, state.x)
        dx = there - state.x
        length = torch.linalg.vector_norm(D * dx, dim=1)
        push = (J @ dx.unsqueeze(-1)).squeeze(-1)
        predicted = -(push * (r + 0.5 * push)).sum(1)
        found = variables.residuals(there)
        new = cost(found, s.rho, s.f_scale)
        new = torch.where(new.isfinite(), new, torch.inf)
        actual = state.cost - new
        ratio = actual / predicted.clamp(min=torch.finfo(r.dtype).tiny)
        good = waiting & (ratio > _ACCEPT) & (actual > 0)
        x = torch.where(good.unsqueeze(1), there, x)
        moved = torch.where(good.unsqueeze(1), found, moved)
        now = torch.where(good, new, now)
        shrink, grow = ratio < 0.25, (ratio > 0.75) | (lam == 0) & (ratio >= 0.25)
        radius = torch.where(waiting & shrink, 0.25 * torch.minimum(length, radius), radius)
        radius = torch.where(waiting & ~shrink & grow, torch.maximum(radius, 2 * length), radius)
        small = (actual.abs() <= s.ftol * state.cost) & (predicted <= s.ftol * state.cost) & (ratio <= 2)
        size = torch.linalg.vector_norm(D * there, dim=1)
        still = (length <= s.xtol * (s.xtol + size)) | (radius <= s.xtol * size * 1e-2)
        _stop(state, waiting & small & still, 4)
        _stop(state, waiting & small, 2)
        _stop(state, waiting & still, 3)
        waiting = waiting & ~good & (state.status == -2)
    state.x, state.r, state.cost = x, moved, now
    state.J = variables.jacobian(state.x)
    state.njev += 1
    bad = (state.status == -2) & ~state.J.flatten(1).isfinite().all(1)
    _stop(state, bad, -1)
    return radius


def _decomposed(J: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decompositions of the problems that go on, which are most of the cost; zero elsewhere."""
    rows = running.nonzero().squeeze(1)
    parts = torch.linalg.svd(J if len(rows) == len(J) else J[rows], full_matrices=False)
    if len(rows) == len(J):
        return parts[0], parts[1], parts[2]
    U, sigma, Vh = (part.new_zeros(len(J), *part.shape[1:]).index_copy_(0, rows, part) for part in parts)
    return U, sigma, Vh


def _stop(state: State, where: Tensor, status: int) -> None:
    state.status = torch.where((state.status == -2) & where, status, state.status)


def _diagonal(s: Settings, J: Tensor, before: Tensor | None) -> Tensor:
    """Scales D of the unknowns: their own, or the largest norms of their columns so far."""
    if s.scale is not None:
        return 1 / s.scale
    norms = torch.linalg.vector_norm(J, dim=1).nan_to_num(0.0)
    if before is not None:
        return torch.maximum(before, norms)
    return torch.where(norms > 0, norms, 1.0)


def _within(svd: tuple[Tensor, ...], r: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    r"""The step p of :math:`\min \lVert J_s p + r \rVert, \lVert p \rVert \le \Delta`, and its multiplier.

    On the boundary the multiplier solves :math:`\lVert p(\lambda) \rVert = \Delta` by Newton's method on its
    reciprocal (Moré 1978, section 5), for all problems at once.
    """
    U, sigma, Vh = svd
    b = (U.mT @ r.unsqueeze(-1)).squeeze(-1)
    eps = torch.finfo(sigma.dtype).eps
    keep = sigma > eps * max(U.shape[-2:]) * sigma[:, :1]
    safe = torch.where(keep, sigma, 1.0)
    newton = torch.where(keep, b / safe, 0.0)
    inside = torch.linalg.vector_norm(newton, dim=1) <= radius
    g = sigma * b
    lam = torch.where(inside, 0.0, torch.linalg.vector_norm(g, dim=1) / radius)
    low = torch.zeros_like(lam)
    high = lam.clone()
    for _ in range(30):
        d = sigma.square() + lam.unsqueeze(1)
        d = torch.where(d > 0, d, torch.inf)
        size = torch.linalg.vector_norm(g / d, dim=1)
        slope = (g.square() / d**3).sum(1)
        over = size > radius
        low, high = torch.where(over, lam, low), torch.where(over, high, lam)
        new = lam + (size / radius - 1) * size.square() / slope.clamp(min=torch.finfo(size.dtype).tiny)
        new = torch.where((new > low) & (new < high), new, torch.where(low > 0, (low * high).sqrt(), 1e-3 * high))
        settled = inside | ((size - radius).abs() <= 0.05 * radius)
        if bool(settled.all()):
            break
        lam = torch.where(settled, lam, new)
    d = sigma.square() + lam.unsqueeze(1)
    weights = torch.where(inside.unsqueeze(1), newton, g / torch.where(d > 0, d, torch.inf))
    return -(Vh.mT @ weights.unsqueeze(-1)).squeeze(-1), lam


def _bend(
    variables: Variables,
    s: Settings,
    state: State,
    D: Tensor,
    svd: tuple[Tensor, ...],
    J: Tensor,
    p: Tensor,
    lam: Tensor,
    held: Tensor,
) -> Tensor:
    """Half the geodesic acceleration of a step, zero where it is too large for a parabola."""
    U, sigma, Vh = svd
    h = _PROBE
    raw = state.J
    probe = (state.x + h * p / D).clamp(s.lower, s.upper)
    there = variables.residuals(probe)
    push = (raw @ (p / D).unsqueeze(-1)).squeeze(-1)
    second = 2 / h * ((there - state.r) / h - push)
    second = torch.where(second.isfinite().all(1, keepdim=True), second, 0.0)
    d = sigma.square() + lam.unsqueeze(1)
    d = torch.where(d > torch.finfo(d.dtype).eps ** 2 * sigma[:, :1].square(), d, torch.inf)
    a = -(Vh.mT @ (sigma * (U.mT @ second.unsqueeze(-1)).squeeze(-1) / d).unsqueeze(-1)).squeeze(-1)
    a = torch.where(held, 0.0, a)
    short = 2 * torch.linalg.vector_norm(a, dim=1) <= _BEND * torch.linalg.vector_norm(p, dim=1)
    return torch.where(short.unsqueeze(1), 0.5 * a, 0.0)


def at_bound(x: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """-1 where the lower bound holds an unknown against its gradient, 1 where the upper one does."""
    below, above = (x <= lower) & (gradient > 0), (x >= upper) & (gradient < 0)
    return above.to(torch.int8) - below.to(torch.int8)


def optimality(J: Tensor, r: Tensor, held: Tensor) -> Tensor:
    """Largest cosine between the residuals and a free column of the Jacobian ``(problems,)``."""
    norms = torch.linalg.vector_norm(J, dim=1) * torch.linalg.vector_norm(r, dim=1, keepdim=True)
    along = (J.mT @ r.unsqueeze(-1)).squeeze(-1).abs()
    cosines = torch.where((norms > 0) & ~held, along / torch.where(norms > 0, norms, 1.0), 0.0)
    return cosines.amax(1)
