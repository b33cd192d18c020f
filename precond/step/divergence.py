"""Detect and explain values that are not finite and failing refreshes, with their limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from solvers.precision import working_dtype
from solvers.tree import pieces, place

#: Refreshes of one block or parameter that may fail in a row before an error is raised.
TOLERATED_FAILURES = 3

Name = Callable[[Tensor], str]


class Diverged(FloatingPointError):
    """A step was refused because it is not finite, and the run is told to stop or to go on without it."""


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether all are finite, with one wait for the device."""
    gradients = [g for g in gradients if g.numel()]
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients)
    if bool(torch.isfinite(torch.stack([n.to(norms[0].device, torch.float32) for n in norms])).all()):
        return True
    # The sum of squares may have overflowed while all entries are finite.
    return all(bool(torch.isfinite(g).all()) for g in gradients)


def finite_squares(gradients: list[Tensor]) -> bool:
    """Whether all are finite and so is the sum of their squares, in float32 at least."""
    gradients = [g.to(working_dtype(g)) for g in gradients if g.numel()]
    if not gradients:
        return True
    norms, limit = list(torch._foreach_norm(gradients)), min(torch.finfo(g.dtype).max for g in gradients)
    if any(n.dtype != norms[0].dtype or n.device != norms[0].device for n in norms):
        norms = [n.to(norms[0].device, torch.float64) for n in norms]
    return bool((torch.stack(norms).double().square() < limit).all())


def broken_gradients(gradients: Mapping[Tensor, Tensor], name_of: Name) -> str:
    """Which gradients are not finite."""
    bad = [p for p, g in gradients.items() if not torch.isfinite(g).all()]
    which = f" ({len(bad)} of {len(gradients)} parameters, the first: {name_of(bad[0])})" if bad else ""
    return f"a gradient holds NaN or inf{which}"


def broken_results(results: Mapping[Tensor, Tensor], state: Any, name_of: Name) -> str:
    """Why the results of a step are not finite though its gradients are.

    Args:
        results: Parameter -> direction or new value.
        state: What the optimizer's ``state_dict`` holds of the parameters, before the step.
        name_of: Names a parameter.
    """
    held = ((path, x) for path, x in pieces(state) if isinstance(x, Tensor) and x.is_floating_point())
    if (broken := next((path for path, x in held if not torch.isfinite(x).all()), None)) is not None:
        return (
            f"the gradients are finite, but the optimizer's own state holds NaN or inf, in {place(broken)} of its "
            "state_dict; load the state of the last checkpoint"
        )
    bad = [p for p, value in results.items() if not torch.isfinite(value).all()]
    which = f" ({len(bad)} of {len(results)} parameters, the first: {name_of(bad[0])})" if bad else ""
    return f"the gradients are finite, but the step that follows from them overflows{which}"


def advice(params: Iterable[Tensor], name_of: Name) -> str:
    """Advice about a stuck run, by whether its parameters are still finite."""
    broken = next((p for p in params if not torch.isfinite(p).all()), None)
    if broken is not None:
        return (
            f"{name_of(broken)} is itself not finite, so nothing can be learnt from here: go back to a checkpoint and "
            "lower the learning rate or raise the damping"
        )
    return (
        "all parameters are finite, so look at (a) the batches and their targets, (b) the loss, such as log or "
        "division near zero, (c) overflow in half precision, for which there is torch.amp.GradScaler, (d) the state of "
        "the optimizer, where it is named above; a lower learning rate from the last checkpoint on helps where the "
        "parameters have become very large"
    )
