"""Does every option of every method change the run in which it should act, or is it refused by name?

A walk over the signatures: an option that is added without a line here fails the test.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from precond import (
    AdaptiveRate,
    EMANesterov,
    Hyperball,
    KroneckerBFGS,
    LevenbergMarquardt,
    Loop,
    QuadraticModel,
    SINGDFisher,
    Tables,
    Vectors,
    methods,
)
from tests.precond.test_protocol import METHODS, Training

#: Most options act in two steps.
STEPS = (2, 6)
#: Given by the harness itself.
GIVEN = {"model", "loss_fn", "params"}
#: They act in several processes: ``tests/precond/distributed``.
GIVEN |= {"process_group", "memory_fraction", "shards"}
_RULE = LevenbergMarquardt(decrease=0.5, increase=2.0)

#: Option -> two values; and what else it needs to act, by method or for all.
VALUES: dict[str, tuple[Any, Any]] = {
    "lr": (0.01, 0.02),
    "weight_decay": (0.0, 0.1),
    "momentum": (0.0, 0.5),
    "kl_clip": (None, 1e-9),
    "maximize": (False, True),
    "loop": (Loop(), Loop(seed=1)),
    "damping": (0.1, 0.5),
    "curvature_ema": (0.5, 0.9),
    "curvature_update_period": (1, 3),
    "inverse_update_period": (1, 3),
    "fisher": ("mc", "empirical"),
    "sharing": ("expand", "reduce"),
    "structures": (None, {"hidden": "diagonal"}),
    "step_size": (None, QuadraticModel()),
    "damping_rule": (None, _RULE),
    "betas": ((0.9, 0.9), (0.5, 0.5)),
    "eps": (1e-8, 0.3),
    "max_dim": (10000, 1),
    "max_ratio": (4.0, 0.0),
    "merge_dims": (None, 64),
    "norm_control": (None, Hyperball()),
    "lookahead": (None, EMANesterov(5.0, 0.5)),
    "cautious": (False, True),
    "tables": (None, Tables(ratio=0.0)),
    "vectors": (None, Vectors(lr=2.0)),
    "adaptive_rate": (None, AdaptiveRate()),
    "row_normalization": (None, 0.5),
    "warm_average": (True, False),
    "curvature": (KroneckerBFGS(), KroneckerBFGS(initial=0.1)),
    # one method each
    "rotate_vectors": (False, True),
    "exponent": (None, -0.5),
    "grafting": ("adam", None),
    "eigenvalue_correction": (False, True),
    "start_step": (1, 4),
    "block_size": (1024, 2),
    "average_decay": (0.999, 0.5),
    "vector_scale": (1e-3, 1.0),
    "rank": (2, 3),
    "scale": (0.25, 1.0),
    "inner": (torch.optim.Adam, torch.optim.SGD),
    "inner_options": (None, {"eps": 0.1}),
    "window": (4, 2),
    "scaling": ("adam", "spectral"),
    "polynomial": ("polar_express", "quintic"),
    "precision": ("full", "bfloat16"),
    "orthogonalize": (True, False),
    "stacked": (False, True),
    "gamma": (0.5, 5.0),
    "estimator": ("hutchinson", "gauss_newton"),
    "hessian_power": (1.0, 0.5),
    "beta": (0.9, 0.5),
    "criterion": ("whitening", "hessian"),
    "preconditioner_lr": (0.1, 0.3),
    "max_rms": (None, 0.1),
    "max_steps": (12, 3),
    "rtol": (1e-10, 0.5),
    "min_progress": (5e-4, 0.5),
    "warm_start": (0.95, 0.0),
    "preconditioner": (True, False),
    "samples": (1, 3),
    "mode": ("absolute", "plain"),
    "solver": ("cholesky", "cg"),
    "scaled": (False, True),
    "acceleration": (True, False),
    "spring": (0.0, 0.5),
    "iterations": (1, 3),
    "wolfe": ((1e-4, 0.9), (1e-4, 0.1)),
    "sketch": (3, 1),
}
#: Where an option has other values.
SPECIAL: dict[tuple[str, str], tuple[Any, Any]] = {
    ("SINGD", "structure"): ("dense", "diagonal"),
    ("NaturalGradient", "structure"): ("layer", "diagonal"),
    ("SMWNaturalGradient", "structure"): ("dense", "layer"),
    ("PSGD", "eps"): (1e-6, 0.9),
    ("Muon", "eps"): (1e-8, 0.3),
    ("GaussNewton", "kl_clip"): (None, 1e-12),
    ("Muon", "momentum"): (0.5, 0.9),
    ("SOAPMuon", "momentum"): (0.5, 0.9),
    ("SSBFGS", "window"): (None, 1),
    ("KBFGS", "loop"): (Loop(), Loop(batch_dim=1)),  # it draws nothing
}
#: What a method needs besides, so that it runs and the option acts.
BESIDE: dict[str, dict[str, Any]] = {
    "Newton": {"mode": "absolute", "damping": 0.5},
    "GaussNewton": {"damping": 0.5},
    "HessianFree": {"max_steps": 12, "samples": 1},
    "GaLore": {"rank": 2},
    "MFAC": {"window": 4, "damping": 0.1},
    "SENG": {"sketch": 3, "curvature_update_period": 1},
    "Sophia": {"curvature_update_period": 2, "gamma": 0.5},
    "SMWNaturalGradient": {"structure": "layer"},
}
#: Methods that invert nothing at this period: it is for other structures.
_OTHERS = {"inverse_update_period": {"structures": {"hidden": "layer"}}}
NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    **{(name, "inverse_update_period"): _OTHERS["inverse_update_period"] for name in ("KBFGS", "SINGD", "SENG")},
    ("SMWNaturalGradient", "inverse_update_period"): _OTHERS["inverse_update_period"],
    ("SINGD", "damping"): {"fisher": SINGDFisher(initial=10.0)},
    ("PSGD", "loop"): {"criterion": "hessian"},
    ("SMWNaturalGradient", "loop"): {"fisher": "mc"},
    ("SENG", "loop"): {"sketch": 2},
    ("Shampoo", "grafting"): {"lr": 1e-3},  # without it a step of its own length, which is another unit
    ("GaussNewton", "acceleration"): {"damping": 50.0},  # steps so short that their bend counts
}


def run(name: str, options: dict[str, Any], steps: int) -> list[Tensor]:
    """Parameters after some steps, and their averages where the method keeps some."""
    torch.manual_seed(0)
    layered = {"lr": 0.01, "damping": 0.1} if METHODS[name].needs == "layers" else {}
    training = Training(name)
    training.options = {**layered, **BESIDE.get(name, {}), **options}
    training.optimizer = training.make(training.model.parameters())
    needed = getattr(training.optimizer, "closure_needed", None)
    for step in range(steps):
        if needed is not None and needed():
            training.optimizer.step(lambda step=step: training.loss(step))
        else:
            training.step(step)
    out = training.values()
    if hasattr(training.optimizer, "averaged"):
        with training.optimizer.averaged():
            out += training.values()
    return out


def pairs() -> list[tuple[str, str]]:
    return [
        (method.name, option)
        for method in methods()
        for option in inspect.signature(method.cls).parameters
        if option not in GIVEN
    ]


@pytest.mark.parametrize(("name", "option"), pairs())
def test_two_values_give_two_runs_or_a_refusal(name: str, option: str) -> None:
    first, second = SPECIAL.get((name, option)) or VALUES[option]
    beside = {key: value for key, value in NEEDS.get((name, option), {}).items() if key != option}
    for steps in STEPS:
        start = run(name, {**beside, option: first}, steps)
        try:
            other = run(name, {**beside, option: second}, steps)
        except (ValueError, TypeError, RuntimeError) as error:
            assert option in str(error) or name in str(error), "refused, but not by name"
            return
        if not all(torch.equal(p, q) for p, q in zip(start, other, strict=True)):
            return
    pytest.fail(f"{option} has no effect")
