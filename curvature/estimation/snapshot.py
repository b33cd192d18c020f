"""Estimates in the middle of a step, as nested dicts of tensors and numbers, and back, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.structures.estimator import CurvatureEstimator
from curvature.structures.weighted_mean import WeightedMean
from solvers import LinearOperator, from_state, state


def take(estimator: CurvatureEstimator) -> dict[str, Any]:
    """Everything an estimate holds, what waits to be committed included; its ``state_dict`` leaves that out.

    Raises:
        TypeError: If it holds something that cannot be stored.
    """
    return {name: _encode(value, name) for name, value in vars(estimator).items() if name != "block"}


def restore(estimator: CurvatureEstimator, taken: dict[str, Any], device: torch.device) -> None:
    """Give a fresh estimate of the same block what :func:`take` found."""
    for name, value in taken.items():
        setattr(estimator, name, _decode(value, getattr(estimator, name, None), device))


def _encode(value: Any, name: str) -> Any:
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {"dict": {key: _encode(item, name) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return type(value)(_encode(item, name) for item in value)
    if isinstance(value, CurvatureEstimator):
        return {"estimator": take(value)}
    if isinstance(value, WeightedMean):
        return {"mean": {key: _encode(item, name) for key, item in vars(value).items()}}
    if isinstance(value, LinearOperator):
        return {"operator": state(value)}
    raise TypeError(
        f"an estimate holds a {type(value).__name__} as {name}, which a file cannot keep: tensors, numbers, strings, "
        "means, operators and other estimates can, and dicts, lists and tuples of them."
    )


def _decode(value: Any, current: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)  # not the file's: sums are made in place
    if isinstance(value, (list, tuple)):
        return type(value)(_decode(item, None, device) for item in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "dict":
            return {key: _decode(item, None, device) for key, item in content.items()}
        case "estimator":
            restore(current, content, device)
            return current
        case "mean":
            mean = WeightedMean()
            vars(mean).update({key: _decode(item, None, device) for key, item in content.items()})
            return mean
    return from_state(content).to(device=device)
