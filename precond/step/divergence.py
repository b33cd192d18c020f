"""Detect and explain values that are not finite and failing refreshes, with their limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precond.distributed.sharded import added_up, agreed, any_sharded, is_sharded, local
from solvers.precision import working_dtype
from solvers.tree import pieces, place

#: Refreshes of one block or parameter that may fail in a row before an error is raised.
TOLERATED_FAILURES = 3

Name = Callable[[Tensor], str]


class Diverged(FloatingPointError):
    """A step was refused because it is not finite, and the run is told to stop or to go on without it."""


def largest_norm(tensors: Sequence[Tensor]) -> float:
    """Largest Euclidean norm of some tensors, NaN or infinite where one of them is not finite; one wait for the device.

    Where not even float64 holds the squares, the largest entry.
    """
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return 0.0
    if any_sharded(tensors):
        return _largest_norm_of_shards(tensors)
    top = float(_row(torch._foreach_norm(tensors)).max())
    if not math.isfinite(top) and tensors[0].device.type != "mps":
        top = float(_row([torch.linalg.vector_norm(t.to(_widest(t))) for t in tensors]).max())
    return top if math.isfinite(top) else float(_row([t.abs().max() for t in tensors]).max())


def _largest_norm_of_shards(tensors: Sequence[Tensor]) -> float:
    """:func:`largest_norm` where tensors are shared out over processes, which all get the same."""
    sharded = [t for t in tensors if is_sharded(t)]
    squares = [torch.linalg.vector_norm(local(t).to(_widest(t))).square() for t in sharded]
    whole = largest_norm([t for t in tensors if not is_sharded(t)])
    if not agreed(math.isfinite(whole) and math.isfinite(float(_row(squares).max())), sharded):
        return math.nan
    return max(whole, math.sqrt(float(_row(added_up(squares, sharded)).max())))


def _widest(t: Tensor) -> torch.dtype:
    return torch.complex128 if t.is_complex() else torch.float64


def _row(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers of any device and precision as one tensor, in float32 at least."""
    kinds = {(n.device, n.dtype) for n in numbers}
    if len(kinds) > 1 or numbers[0].itemsize < 4:
        dtype = torch.float64 if any(n.dtype == torch.float64 for n in numbers) else torch.float32
        numbers = [n.to(numbers[0].device, dtype) for n in numbers]
    return torch.stack(list(numbers))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all are finite, with one wait for the device."""
    return math.isfinite(largest_norm(tensors))


def squares_fit(norm: float, tensors: Iterable[Tensor]) -> bool:
    """Whether the squares of tensors, of which the largest norm is given, fit the precisions in which they are kept."""
    limits = {torch.finfo(working_dtype(t)).max for t in tensors if t.numel()}
    return norm * norm < min(limits, default=math.inf)


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
