"""Estimates in the middle of a step, as nested dicts of tensors and numbers, and back, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.structures.estimator import CurvatureEstimator
from curvature.structures.weighted_mean import WeightedMean
from solvers import LinearOperator, from_state, state
from solvers.tree import Path, map_inside, plain


def take(estimator: CurvatureEstimator) -> dict[str, Any]:
    """Everything an estimate holds, what waits to be committed included; its ``state_dict`` leaves that out.

    Raises:
        TypeError: If it holds something that cannot be stored.
    """
    held = {name: value for name, value in vars(estimator).items() if name != "block"}
    return map_inside(_stored, held, (type(estimator).__name__,))


def _stored(piece: Any, path: Path) -> Any:
    match piece:
        case dict():
            return {"dict": map_inside(_stored, piece, path)}
        case CurvatureEstimator():
            return {"estimator": take(piece)}
        case WeightedMean():
            return {"mean": map_inside(_stored, vars(piece), path)}
        case LinearOperator():
            return {"operator": state(piece)}
    return plain(piece, path)


def restore(estimator: CurvatureEstimator, taken: dict[str, Any], device: torch.device) -> None:
    """Give a fresh estimate of the same block what :func:`take` found."""

    def restored(piece: Any, path: Path) -> Any:
        if isinstance(piece, Tensor):
            return piece.to(device, copy=True)  # not the file's: sums are made in place
        if not isinstance(piece, dict):
            return NotImplemented
        ((kind, content),) = piece.items()
        match kind:
            case "dict":
                return map_inside(restored, content, path)
            case "estimator":
                inner = getattr(estimator, path[0])
                restore(inner, content, device)
                return inner
            case "mean":
                mean = WeightedMean()
                vars(mean).update(map_inside(restored, content, path))
                return mean
        return from_state(content).to(device=device)

    held = map_inside(restored, taken)
    if "max_factor" in held:  # as files of version 0.1 have it
        held["max_dim"] = held.pop("max_factor")
    vars(estimator).update(held)
