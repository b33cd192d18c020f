"""Every option of an optimizer refuses what it cannot mean when the optimizer is made, by the option's name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import curvature
import precond

HOSTILE: dict[str, Any] = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-1": -1,
    "'x'": "x",
    "None": None,
    "True": True,
    "huge": 10**400,
    "tensor": torch.full((2,), torch.nan),
    "object": object(),
    "list": [float("nan")],
    "complex": 1j,
}
GRADIENT = (
    *("SOAP", "Shampoo", "KLShampoo", "SPlus", "Muon", "SOAPMuon", "GaLore", "MFAC", "PSGD", "AdaHessian", "Sophia"),
)
CLOSURE = ("Newton", "GaussNewton")
LAYERWISE = ("KFAC", "EKFAC", "TNT", "KBFGS", "SENG", "SINGD", "NaturalGradient", "SMWNaturalGradient")


def refused(x: torch.Tensor) -> torch.Tensor:
    """Residuals that must not be computed."""
    raise AssertionError("the residuals were computed")


OPTIONS: dict[str, Mapping[str, Any]] = {
    "Momentum": {},
    "WeightDecay": {"strength": 0.1},
    "UpdateFloor": {},
    "RadialBrake": {},
    "EMANesterov": {},
    "Vectors": {},
    "Tables": {},
    "AdaptiveRate": {},
    "Refresh": {"period": 2},
    "Doubling": {"period": 2},
    "LevenbergMarquardt": {},
    "QuadraticModel": {},
    "Loop": {},
    "TrustRegion": {"kl": 1e-3},
    "IterateAverage": {"optimizer": torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)},
    "least_squares": {"fun": refused, "x0": torch.zeros(2)},
}
STRUCTURES = [
    name
    for name in curvature.__all__
    if inspect.isclass(kind := getattr(curvature, name))
    and issubclass(kind, curvature.Curvature)
    and not inspect.isabstract(kind)
    and name != "Mixed"
]

#: Values that have a meaning after all, and messages that name a part of the option.
ALLOWED = {
    ("Shampoo", "exponent", "-1"),
    ("SketchedFisher", "seed", "-1"),
    ("Loop", "seed", "-1"),
    ("Loop", "batch_dim", "-1"),
    ("Loop", "batch_dim", "None"),
    ("least_squares", "x0", "-1"),
    ("least_squares", "args", "list"),
    ("Loop", "class_dim", "-1"),
    ("Tables", "ratio", "inf"),  # no tables
    ("LevenbergMarquardt", "lower", "-1"),
    ("Refresh", "period", "-1"),
    ("Momentum", "strength", "-1"),  # refused with the group, by its name there
    ("WeightDecay", "strength", "-1"),
    ("Loop", "capture", "'x'"),  # refused where it is used
}
OTHER_WORDS = {"factor": "structure", "beta": "betas"}


def tried(name: str) -> tuple[Callable[..., Any], Mapping[str, Any], set[str]]:
    """The public class, options with which it works, and arguments that are none of its options."""
    if name in STRUCTURES:
        return getattr(curvature, name), {}, set()
    kind = getattr(precond, name)
    if name in OPTIONS:
        return kind, OPTIONS[name], {"kl"}  # which is refused with the group, as kl_clip
    if name in GRADIENT + CLOSURE:
        parameters = list(nn.Linear(2, 2).parameters())
        return kind, {"params": parameters}, {"params", "options", "inner", "inner_options"}
    fixed = {"model": nn.Linear(2, 2), "loss_fn": nn.MSELoss(), "lr": 0.1}
    return kind, fixed, {"params", "options"}


@pytest.mark.parametrize("name", [*STRUCTURES, *OPTIONS, *GRADIENT, *CLOSURE, *LAYERWISE])
def test_hostile_values_are_refused_by_name(name: str) -> None:
    kind, good, others = tried(name)
    wrong = []
    for option, parameter in inspect.signature(kind).parameters.items():
        if option in others:
            continue
        for hostile, value in HOSTILE.items():
            annotation = str(parameter.annotation)
            means_something = (
                (hostile == "None" and "None" in annotation)
                or (hostile == "True" and "bool" in annotation)
                or (hostile == "object" and "Any" in annotation)
                or (name, option, hostile) in ALLOWED
            )
            if means_something:
                continue
            try:
                kind(**{**good, option: value})
                wrong.append(f"{option}={hostile} is accepted")
            except AssertionError:
                wrong.append(f"{option}={hostile} is computed with")
            except (TypeError, ValueError) as error:
                if not re.search(rf"\b({option}|{OTHER_WORDS.get(option, option)})\b", str(error)):
                    wrong.append(f"{option}={hostile}: {error}")
    assert not wrong
