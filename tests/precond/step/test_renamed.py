"""Are options under their old names taken, with a warning that shows the new spelling, and never dropped?"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from precond import (
    KBFGS,
    KFAC,
    SENG,
    SINGD,
    SOAP,
    TNT,
    EigenbasisFisher,
    GaLore,
    GramFisher,
    KroneckerBFGS,
    KroneckerFisher,
    LevenbergMarquardt,
    Loop,
    Momentum,
    NaturalGradient,
    PreconditionedOptimizer,
    Refresh,
    SINGDFisher,
    SMWNaturalGradient,
    TensorNormal,
    WeightDecay,
    WholeFisher,
)
from precond.step.renamed import RENAMED, fold, spelled
from precond.step.schedules import DOUBLING_TO_10
from solvers import Eigh

RULE = LevenbergMarquardt(decrease=0.5)

#: Class, options as they were, options as they are, and the spelling that the warning shows.
CASES: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (KFAC, {"nesterov": True}, {"momentum": Momentum(0.9, nesterov=True)}, "momentum=Momentum(0.9, nesterov=True)"),
    (SOAP, {"nesterov": True, "momentum": 0.5}, {"momentum": Momentum(0.5, True)}, "Momentum(0.5, nesterov=True)"),
    (
        KFAC,
        {"weight_decay": 0.1, "decay": "l2"},
        {"weight_decay": WeightDecay(0.1, "l2")},
        "WeightDecay(0.1, form='l2')",
    ),
    (
        KFAC,
        {"stagger": False, "burn_in": 3},
        {"inverse_update_period": Refresh(DOUBLING_TO_10, stagger=False, burn_in=3)},
        "inverse_update_period=Refresh(Doubling(10), stagger=False, burn_in=3)",
    ),
    (SENG, {"burn_in": 3}, {"inverse_update_period": Refresh(1, burn_in=3)}, "Refresh(1, burn_in=3)"),
    (
        KFAC,
        {"samples": 4, "bias": "separate", "max_factor": 99, "fisher": "mc"},
        {"fisher": KroneckerFisher(samples=4, bias="separate", max_dim=99)},
        "fisher=KroneckerFisher(samples=4, bias='separate', max_dim=99)",
    ),
    (TNT, {"fisher": "exact", "max_factor": 99}, {"fisher": TensorNormal("exact", max_dim=99)}, "kind='exact'"),
    (
        SINGD,
        {
            "structure": "block",
            "block_size": 4,
            "factor_lr": 0.1,
            "factor_momentum": 0.2,
            "initial": 2.0,
            "coupled": False,
        },
        {
            "structure": "block",
            "fisher": SINGDFisher(block_size=4, factor_lr=0.1, factor_momentum=0.2, initial=2.0, coupled=False),
        },
        "fisher=SINGDFisher(block_size=4, factor_lr=0.1, factor_momentum=0.2, initial=2.0, coupled=False)",
    ),
    (
        NaturalGradient,
        {"structure": "dense", "max_size": 99},
        {"structure": "dense", "fisher": WholeFisher(max_size=99)},
        "fisher=WholeFisher(max_size=99)",
    ),
    (
        SMWNaturalGradient,
        {"structure": "layer", "fisher": "mc", "samples": 4},
        {"structure": "layer", "fisher": GramFisher("mc", 4)},
        "fisher=GramFisher(samples=4)",
    ),
    (
        KBFGS,
        {"mu": 0.3, "initial": None, "max_factor": 99},
        {"curvature": KroneckerBFGS(mu=0.3, initial=None, max_dim=99)},
        "curvature=KroneckerBFGS(mu=0.3, initial=None, max_dim=99)",
    ),
    (
        KFAC,
        {"rules": {"0": "diagonal"}, "ignore": ["1.*"]},
        {"structures": {"0": "diagonal", "1.*": None}},
        "structures={'0': 'diagonal', '1.*': None}",
    ),
    (
        KFAC,
        {"rule": RULE, "adapt_period": 5, "reject_steps": True},
        {"damping_rule": LevenbergMarquardt(decrease=0.5, period=5, reject_steps=True)},
        "damping_rule=LevenbergMarquardt(decrease=0.5, period=5, reject_steps=True)",
    ),
    (KFAC, {"adapt": RULE}, {"damping_rule": RULE}, "damping_rule=LevenbergMarquardt(decrease=0.5)"),
    (
        KFAC,
        {"class_dim": 1, "capture": "shadow", "eval_mode": True, "nonfinite": "raise", "max_skips": 3, "output": abs},
        {"loop": Loop(abs, 1, "shadow", True, "raise", 3)},
        "loop=Loop(output=<built-in function abs>, class_dim=1, capture='shadow', eval_mode=True, nonfinite='raise'",
    ),
    (GaLore, {"update_period": 9}, {"inverse_update_period": 9}, "inverse_update_period=9"),
    (SENG, {"seed": 7}, {"loop": Loop(seed=7)}, "loop=Loop(seed=7)"),
]


def made(cls: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    return (
        cls(model.parameters(), **options)
        if cls.needs == "grad"
        else cls(model, nn.CrossEntropyLoss(), lr=0.1, **options)
    )


def said(optimizer: Any) -> dict[str, Any]:
    """All that the constructor kept."""
    names = ("curvature", "plain", "stagger", "burn_in", "damping_rule", "step_size", "loop")
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"groups": groups, **{name: getattr(optimizer, name, None) for name in names}}


@pytest.mark.parametrize(("cls", "old", "new", "shown"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_old_names_mean_what_they_meant(cls: Any, old: dict[str, Any], new: dict[str, Any], shown: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^{cls.__name__}: .* now\.$") as record:
        before = made(cls, old)
    assert [str(w.message) for w in record if shown in str(w.message)]
    assert {w.filename for w in record} == {__file__}
    assert said(before) == said(made(cls, new))


def test_there_is_a_case_for_every_name() -> None:
    assert {name for _, old, _, _ in CASES for name in old} >= set(RENAMED)


def test_the_parts_of_a_curvature_object() -> None:
    model, loss_fn = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), nn.CrossEntropyLoss()
    parts: Any = {"curvature": EigenbasisFisher(), "damping": 0.1, "solver": Eigh(), "lr": 0.1}
    with pytest.warns(
        DeprecationWarning, match=r"curvature=\{'\*': EigenbasisFisher\(\), '0': 'diagonal', '1': None\}"
    ):
        optimizer = PreconditionedOptimizer(model, loss_fn, rules={"0": "diagonal"}, ignore=["1"], **parts)  # type: ignore[call-arg]
    assert sorted(optimizer.plain) == ["1.bias", "1.weight"]
    with pytest.warns(DeprecationWarning, match="structures={'1': None} now"):
        assert made(KFAC, {"ignore": "1"}).plain == optimizer.plain


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (KFAC, {"nesterov": True, "momentum": Momentum(0.5)}, r"write momentum=Momentum\(0.5, nesterov=True\)"),
        (KFAC, {"decay": "l2", "weight_decay": WeightDecay(0.1)}, "say it twice"),
        (
            KFAC,
            {"burn_in": 2, "inverse_update_period": Refresh(5)},
            r"write inverse_update_period=Refresh\(5, burn_in=2",
        ),
        (KFAC, {"samples": 2, "fisher": KroneckerFisher()}, r"write fisher=KroneckerFisher\(samples=2\)"),
        (
            KFAC,
            {"rule": RULE, "damping_rule": LevenbergMarquardt()},
            r"write damping_rule=LevenbergMarquardt\(decrease",
        ),
        (KFAC, {"adapt_period": 2, "damping_rule": RULE}, r"decrease=0.5, period=2\)"),
        (KFAC, {"ignore": ["0"], "structures": {"1": None}}, r"write structures=\{'1': None, '0': None\}"),
        (KFAC, {"seed": 1, "loop": Loop(max_skips=3)}, r"write loop=Loop\(max_skips=3, seed=1\)"),
        (KBFGS, {"mu": 0.1, "curvature": KroneckerBFGS(initial=None)}, r"KroneckerBFGS\(mu=0.1, initial=None\)"),
    ],
)
def test_an_old_name_beside_its_object_is_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"^{cls.__name__}: .*{message}"):
        made(cls, options)


def test_a_rule_is_needed_to_adapt_or_reject() -> None:
    with pytest.raises(
        ValueError, match=r"KFAC: reject_steps need.*damping_rule=LevenbergMarquardt\(reject_steps=True\)"
    ):
        made(KFAC, {"reject_steps": True})
    with pytest.raises(ValueError, match=r"KFAC: adapt_period and reject_steps need a rule that changes the damping"):
        made(KFAC, {"adapt_period": 2, "reject_steps": True})
    with pytest.warns(DeprecationWarning, match="damping_rule=None now"):
        assert made(KFAC, {"rule": None, "adapt_period": 1, "reject_steps": False}).damping_rule is None


def test_what_a_method_has_itself_is_not_renamed() -> None:
    def method(seed: int = 0, block_size: int = 3) -> None: ...

    options = {"seed": 3, "block_size": 4, "nesterov": True}
    assert fold(KFAC, inspect.signature(method), options) == options


def test_objects_are_shown_as_one_writes_them() -> None:
    assert spelled(Momentum(0.9)) == "Momentum(0.9)" and spelled(Loop()) == "Loop()"
    assert spelled({"a": KroneckerFisher("exact")}) == "{'a': KroneckerFisher(kind='exact')}"
    assert spelled(Momentum) == repr(Momentum) and spelled(3) == "3"
