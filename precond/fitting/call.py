"""The function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from curvature.model.arguments import a, anything, checked, count, one_of, optional, real
from precond.fitting.engine import Settings, at_bound, fit, optimality
from precond.fitting.result import MESSAGES, LeastSquaresResult, covariance_of
from precond.fitting.robust import LOSSES, LossName, reweighted
from precond.fitting.variables import Variables
from solvers.outcome.arguments import choice, flag, function, number, whole

P = ParamSpec("P")
R = TypeVar("R")

#: Numbers in a Jacobian, at most.
_LARGEST = 2**28


def _check_start(name: str, value: Any) -> Any:
    """What is no tree of real numbers; a module's parameters are looked at where they are read."""
    leaves = [] if isinstance(value, nn.Module) else tree_flatten(value)[0]
    for leaf in leaves:
        if isinstance(leaf, bool) or not isinstance(leaf, (Tensor, Number, np.ndarray, np.generic)):
            raise TypeError(f"{name} holds tensors, a tree of tensors, or is a module; not {leaf!r}.")
        if not isinstance(leaf, Tensor):
            array = np.asarray(leaf)
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise ValueError(f"{name} holds finite real numbers, not {leaf!r}.")
    return value


def _check_scale(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return choice(name, value, ("jac",))
    for leaf in tree_flatten(value)[0]:
        if not isinstance(leaf, (Tensor, np.ndarray)):
            number(name, leaf, low=0.0, open_low=True, unit="Or 'jac', or a tensor like x0.")
        elif not bool(torch.isfinite(torch.as_tensor(leaf)).all()):
            raise ValueError(f"{name} holds finite positive numbers, or is 'jac'.")
    return value


def _check_verbose(name: str, value: Any) -> Any:
    if whole(name, value, low=0) > 2:
        raise ValueError(f"{name} is 0, 1 or 2, not {value!r}.")
    return value


#: Arguments of SciPy's functions and lmfit's that have no counterpart, and what to do instead.
_ELSEWHERE = {
    "jac": "derivatives are exact, by torch",
    "diff_step": "derivatives are exact, by torch",
    "jac_sparsity": "precond.GaussNewton never forms a large Jacobian",
    "method": "there is one method, within bounds or without",
    "tr_solver": "there is one method, within bounds or without",
    "tr_options": "there is one method, within bounds or without",
    "workers": "batched=True solves many problems at once",
    "callback": "verbose=2 prints each step",
    "sigma": "divide the residuals by it",
    "absolute_sigma": "with residuals in units of their errors, the covariance divided by 2 cost / (m - n)",
    "weights": "multiply the residuals by them",
    "p0": "it is x0 here",
}


def _refusing(door: Callable[P, R]) -> Callable[P, R]:
    """The door, which says of arguments known from elsewhere what to do instead."""

    @functools.wraps(door)
    def refusing(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name in _ELSEWHERE:
                raise TypeError(f"least_squares takes no {name}: {_ELSEWHERE[name]}. Leave it out.")
        if len(args) > 2:
            raise TypeError("least_squares takes fun and x0 by position, and everything else by name; it takes no jac.")
        return door(*args, **kwargs)

    return refusing


_TOLERANCE = real(low=0.0, high=1.0, open_high=True)


@_refusing
@checked(
    fun=function,
    x0=_check_start,
    bounds=anything,
    ftol=optional(_TOLERANCE),
    xtol=optional(_TOLERANCE),
    gtol=optional(_TOLERANCE),
    x_scale=_check_scale,
    loss=one_of(LossName),
    f_scale=real(low=0.0, open_low=True),
    max_nfev=optional(count()),
    acceleration=flag,
    batched=flag,
    verbose=_check_verbose,
    args=a((tuple, list), "a tuple of further arguments of fun"),
    kwargs=optional(a(Mapping, "a mapping of further keywords of fun")),
)
def least_squares(
    fun: Callable[..., Any],
    x0: Any,
    *,
    bounds: tuple[Any, Any] = (-math.inf, math.inf),
    ftol: float | None = 1e-15,
    xtol: float | None = 1e-10,
    gtol: float | None = 1e-10,
    x_scale: Any = "jac",
    loss: LossName = "linear",
    f_scale: float = 1.0,
    max_nfev: int | None = None,
    acceleration: bool = True,
    batched: bool = False,
    verbose: int = 0,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> LeastSquaresResult:
    r"""Solve a nonlinear least-squares problem within bounds, with derivatives by torch.

    .. math:: \min_{l \le x \le u} \tfrac12 s^2 \sum_i \rho\big((r_i(x) / s)^2\big)

    Levenberg-Marquardt in a trust region (Moré 1978) with geodesic acceleration: each step solves the linearised
    problem by a singular value decomposition, so that nearly dependent unknowns do no harm; unknowns that a bound holds
    stay out of it. The signature is that of ``scipy.optimize.least_squares``, without ``jac``: derivatives are exact.

    >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)
    >>> y = 2.5 * torch.exp(-1.3 * t)
    >>> found = least_squares(lambda x: x[0] * torch.exp(-x[1] * t) - y, torch.tensor([1.0, 0.5], dtype=torch.float64))
    >>> [round(value, 6) for value in found.x.tolist()], bool(found.success)
    ([2.5, 1.3], True)

    Thousands of small problems are solved at once with ``batched=True``: the first axis of all tensors counts problems,
    and ``fun`` maps ``(problems, ...)`` to ``(problems, m)``, each row by itself.

    Args:
        fun: Residuals r of the unknowns: a tensor of any shape, or a tree of tensors.
        x0: Start: a tensor, a tree of tensors (a dict of named unknowns), or a module, which ``fun`` is called with and
            whose trainable parameters are fitted in place. Numbers are taken in float64, which is recommended.
        bounds: ``(lower, upper)``, each a number or like ``x0``; or SciPy's ``Bounds``.
        ftol: Stop when a step lowers the cost by less than this fraction, and was predicted to; ``None`` (here and
            below) is never.
        xtol: Stop when a step is shorter than this fraction of the scaled unknowns.
        gtol: Stop when the cosine between the residuals and every column of their Jacobian is below this.
        x_scale: Typical sizes of the unknowns, a number or like ``x0``; ``"jac"`` takes the inverse norms of the
            Jacobian's columns, which makes the fit blind to units.
        loss: ``"linear"``, ``"soft_l1"``, ``"huber"``, ``"cauchy"`` or ``"arctan"``, for residuals with outliers.
        f_scale: s, the size at which a residual begins to count as an outlier.
        max_nfev: Evaluations of the residuals at most; 200 (n + 1) by default.
        acceleration: Follow narrow curved valleys along their curvature, at an evaluation more per step; only under
            the linear loss.
        batched: Whether the first axis counts problems.
        verbose: 1 prints how it ended, 2 each step.
        args: Further positional arguments of ``fun``.
        kwargs: Keyword arguments of ``fun``.

    Returns:
        Unknowns, cost, residuals, Jacobian, why it stopped, and the covariance of the unknowns.

    Raises:
        ValueError: If an option is out of range, bounds cross or exclude the start, or the Jacobian would not fit.
        TypeError: If ``x0`` holds nothing to fit, or the residuals are complex, sparse, or do not depend on it.

    References:
        Moré (1978); Transtrum and Sethna (2012), https://arxiv.org/abs/1201.5885; Triggs et al. (2000), section 4.3
        (robust losses)
    """
    extra = dict(kwargs or {})
    variables = Variables(lambda x: fun(x, *args, **extra), x0, batched)
    with torch.no_grad():
        rows = variables.rows()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("x0 holds NaN or infinity.")
        lower, upper = _bounds(variables, bounds)
        scale = None
        if not (isinstance(x_scale, str) and x_scale == "jac"):
            scale = variables.like("x_scale", x_scale, 1.0)
            if not bool((scale > 0).all()):
                raise ValueError("x_scale must be 'jac' or positive numbers.")
        residuals = variables.residuals(rows)
        m = residuals.shape[1]
        if len(rows) * m * rows.shape[1] > _LARGEST:
            raise ValueError(
                f"the Jacobian has {len(rows)} x {m} x {rows.shape[1]} numbers. Use precond.GaussNewton(solver='cg'), "
                "which never forms it, or fewer problems at once."
            )
        settings = Settings(
            lower, upper, scale, LOSSES[loss], f_scale, ftol or 0.0, xtol or 0.0, gtol or 0.0,
            200 * (rows.shape[1] + 1) if max_nfev is None else max_nfev, acceleration, _line if verbose > 1 else None,
        )  # fmt: skip
        state = fit(variables, settings, rows, residuals)
        r, J = reweighted(state.r, state.J, settings.rho, f_scale)
        gradient = (J.mT @ r.unsqueeze(-1)).squeeze(-1)
        mask = at_bound(state.x, gradient, lower, upper)
        success = state.status > 0
        trusted = success & torch.tensor(loss == "linear", device=success.device)
        covariance, valid, rank = covariance_of(state.J, state.r, mask != 0, trusted)
        worst = int(state.status.min() if bool((state.status <= 0).any()) else state.status.max())
        numbers = {
            "cost": state.cost,
            "fun": state.r,
            "jac": state.J,
            "grad": gradient,
            "optimality": optimality(J, r, mask != 0),
            "active_mask": mask,
            "status": state.status,
            "success": success,
            "covariance": covariance,
            "covariance_valid": valid,
            "rank": rank,
        }
        result = LeastSquaresResult(
            x=variables.tree(state.x),
            nfev=variables.calls,
            njev=state.njev,
            message=MESSAGES[worst],
            **{name: value if batched else value[0] for name, value in numbers.items()},
        )
    if verbose:
        print(f"{result.message}; cost {float(state.cost.sum()):.6g} after {result.nfev} evaluations")
    return result


def _bounds(variables: Variables, bounds: Any) -> tuple[Tensor, Tensor]:
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        bounds = (bounds.lb, bounds.ub)
    if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise ValueError(f"bounds must be (lower, upper), got {bounds!r}.")
    lower, upper = variables.like("bounds", bounds[0], -math.inf), variables.like("bounds", bounds[1], math.inf)
    if not bool((lower < upper).all()):
        raise ValueError("each lower bound must be below its upper bound.")
    rows = variables.rows()
    if not bool(((rows >= lower) & (rows <= upper)).all()):
        raise ValueError("x0 lies outside of the bounds.")
    return lower, upper


def _line(step: int, cost: Tensor, cosine: Tensor) -> None:
    print(f"step {step:4d}  cost {float(cost.sum()):.10g}  optimality {float(cosine.max()):.2e}")
