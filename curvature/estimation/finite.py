"""Results that hold NaN or inf, though the loss is finite."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from curvature.losses import NonFiniteCurvatureError
from curvature.model.parameters import Parameters
from solvers.outcome.finite import is_finite


def refuse_nonfinite(
    result: Tensor, what: str, parameters: Parameters | None = None, again: Callable[[], object] | None = None
) -> None:
    """Refuse NaN and inf in a result, with what made them. Waits for the device.

    Args:
        result: Any tensor; ``(..., P)`` if the parameters are given.
        what: What it is, for the message.
        parameters: Parameters along its last axis.
        again: Computes it once more, to find the operation.

    Raises:
        NonFiniteCurvatureError: If there are any.
    """
    if is_finite(result):
        return
    where: Iterable[str] = ()
    if parameters is not None:
        bad = ~torch.isfinite(result).reshape(-1, result.shape[-1]).all(0)
        where = [name for name, part in parameters.unflatten(bad).items() if bool(part.any())]
    raise NonFiniteCurvatureError(words(what, where, again))


def words(what: str, where: Iterable[str] = (), again: Callable[[], object] | None = None) -> str:
    """The message: where, by which operation, and what to do."""
    names = list(where)
    shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    operation = None if again is None else _operation(again)
    return (
        f"{what} is not finite{f' in {shown}' if names else ''}, though the loss is. "
        f"{f'The derivative of {operation} is the first that is not. ' if operation else ''}"
        "A derivative is infinite or undefined at some input: (a) a square root, a norm, a power or a division at 0: "
        "add a small constant inside, as in (x.square().sum() + eps).sqrt(); (b) the logarithm of a probability that "
        "is exactly 0 or 1: let the model return logits, and use nn.BCEWithLogitsLoss or nn.CrossEntropyLoss; (c) "
        "numbers out of the range of the dtype: use float64, or scale the inputs."
    )


def _operation(again: Callable[[], object]) -> str | None:
    """The operation whose derivative is the first to be NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the cost of looking
        with torch.autograd.detect_anomaly(check_nan=True):
            try:
                again()
            except RuntimeError as error:  # without a name for the operation, whatever else fails: this one is told
                found = re.search(r"Function '(\w+?)(?:Backward)+\d*' returned nan", str(error))
                return None if found is None else found[1]
    return None
